"""ZeroMQ as this package uses it: options that both ends share, keys, and addresses.

Between hosts rows travel by TCP, encrypted and authenticated by CURVE: each end has a key pair, knows the public key of
the other, and keeps its secret to itself; public keys travel through Ray. On one host they travel by a Unix socket in a
folder that its owner alone may enter.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

FOLDER_PREFIX = "moe-bitnet-"

ZAP_DOMAIN = b"moe-bitnet"
"""Name under which a server asks its authenticator about a peer's key."""

_QUEUED_FRAMES = 16  # a dispatcher has one request and a few probes on the way; more is memory for those who flood
_LARGEST_TTL_MS = 6_553_599  # ZMTP has 16 bits for tenths of seconds
_LONG_FRAME_BYTES = 9  # ZMTP 3.1: flags and an eight-byte size; a frame under 256 bytes has one byte of size
_SHORT_FRAME_BYTES = 2
_CURVE_BYTES = 33  # CurveZMQ's MESSAGE command: its name, nonce, flags and authenticator
_SHORT_FRAME_LIMIT = 256


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair.

    Attributes:
        public: 40 characters (Z85), for others.
        secret: 40 characters (Z85); never printed, never sent.
    """

    public: str
    secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> "KeyPair":
        """Make a new pair from the system's random numbers."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


@dataclass(frozen=True)
class HostAddress:
    """Where one expert host listens.

    Attributes:
        device_name: of the device.
        machine_id: who has the same may use ``local_endpoint``.
        local_endpoint: ``ipc://`` of a Unix socket.
        remote_endpoint: ``tcp://`` with the address that the cluster knows the host by; ``None`` on one machine.
        public_key: of the host, for ``remote_endpoint``.
    """

    device_name: str
    machine_id: str
    local_endpoint: str
    remote_endpoint: str | None
    public_key: str

    def endpoint_from(self, machine_id: str) -> str:
        """Return the endpoint to use from a machine: the local one on the same machine."""
        if machine_id == self.machine_id or self.remote_endpoint is None:
            return self.local_endpoint
        return self.remote_endpoint


def remove_socket_folder(address: HostAddress, machine_id: str) -> None:
    """Remove what a host on this machine left behind that was killed; nothing happens for others."""
    folder = Path(address.local_endpoint.removeprefix("ipc://")).parent
    if address.machine_id == machine_id and folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def set_common_options(socket: zmq.Socket[Any], heartbeat_s: float, max_frame_bytes: int) -> None:
    """Set what both ends of a connection need: heartbeats, limits, and no waiting when it is closed."""
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = _QUEUED_FRAMES
    # a larger message, encrypted or not, ends the connection before memory is taken for it
    socket.maxmsgsize = max_frame_bytes + _CURVE_BYTES
    # a ping after a third of the silence that is allowed, the rest for its answer; the end that is asked
    # takes three silences of the other for its loss
    interval_ms = max(1, int(heartbeat_s * 1000 / 3))
    socket.heartbeat_ivl = interval_ms
    socket.heartbeat_timeout = 2 * interval_ms
    socket.heartbeat_ttl = min(max(100, 9 * interval_ms), _LARGEST_TTL_MS)


def framing_bytes(frame_bytes: int, is_encrypted: bool) -> int:
    """Return the bytes that ZeroMQ adds to a frame on the wire (ZMTP 3.1 and CurveZMQ).

    Args:
        frame_bytes: header and body of our frame.
        is_encrypted: whether the connection uses CURVE.
    """
    total = frame_bytes + (_CURVE_BYTES if is_encrypted else 0)
    framing = _SHORT_FRAME_BYTES if total < _SHORT_FRAME_LIMIT else _LONG_FRAME_BYTES
    return total - frame_bytes + framing
