"""The listening end: takes frames from any number of dispatchers, answers them one after the other.

A peer that sends bytes which are no frame gets a refusal and is not listened to again; others do not notice. A peer
whose key was not allowed never gets as far as sending a frame: its handshake fails.
"""

import ipaddress
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from cluster.transport.codec import encode
from cluster.transport.frames import RefusalFrame, RefusalReason
from cluster.transport.header import peek_request_id
from cluster.transport.sockets import FOLDER_PREFIX, ZAP_DOMAIN, HostAddress, KeyPair, set_common_options
from moe_bitnet.errors import BulkChannelError, ClusterError, ConfigError, FrameError, MoEBitNetError, StalePlanError

logger = logging.getLogger(__name__)

_MAX_DROPPED = 4096
_STOP = b"stop"


class _AllowedKeys:
    """The public keys that may connect; asked by the authenticator's thread."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def allow(self, public_key: str) -> None:
        self._keys = self._keys | {public_key}

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a key may connect; the name is the authenticator's."""
        is_allowed = key.decode() in self._keys
        if not is_allowed:
            logger.warning("a peer without an allowed key was refused")
        return is_allowed


class FrameServer:
    """Answers frames until it is stopped.

    A peer that was let in is trusted in one thing: ZeroMQ bounds each part of a message (``max_frame_bytes``), but
    keeps parts until the last one has come, however many they are.

    Args:
        device_name: of the device that is served.
        answer: frame → answer; may raise :class:`moe_bitnet.errors.MoEBitNetError`, which the peer is told.
        max_frame_bytes: larger frames end their connection unread.
        ip: address to bind TCP to, or ``None`` for this machine alone. Never that of all interfaces.
        machine_id: see :class:`cluster.transport.sockets.HostAddress`.
        heartbeat_s: see :class:`cluster.config.ClusterConfig`.

    Raises:
        ConfigError: ``ip`` is no address, or stands for all interfaces.
        ClusterError: the address cannot be bound.
    """

    def __init__(
        self,
        device_name: str,
        answer: Callable[[memoryview], bytes],
        max_frame_bytes: int,
        ip: str | None = None,
        machine_id: str = "",
        heartbeat_s: float = 0.6,
    ) -> None:
        endpoint = None if ip is None else _tcp_endpoint(ip)
        self._answer = answer
        self._keys, self._allowed = KeyPair.generate(), _AllowedKeys()
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))  # mode 0700
        self._context = zmq.Context()
        self._dropped: dict[tuple[int, bytes], None] = {}
        self._thread: threading.Thread | None = None
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), self._allowed)
        local = f"ipc://{self._folder}/{os.getpid()}"
        self._sockets: list[zmq.Socket[Any]] = []
        self._stop_name = f"inproc://stop-{id(self)}"
        self._stopper = self._context.socket(zmq.PAIR)
        self._stopper.bind(self._stop_name)
        remote = None
        try:
            self._listen(local, heartbeat_s, max_frame_bytes)
            if endpoint is not None:
                remote = self._listen(endpoint, heartbeat_s, max_frame_bytes, is_encrypted=True)
        except zmq.ZMQError as error:
            self.stop()
            raise ClusterError(
                f"host {device_name!r} cannot listen at {local}{'' if ip is None else f' and {ip}'} ({error}). "
                f"Give an address of this machine, and a shorter TMPDIR if the path is too long."
            ) from error
        self.address = HostAddress(device_name, machine_id, local, remote, self._keys.public)

    def __enter__(self) -> "FrameServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def allow(self, public_key: str) -> None:
        """Let the holder of a key connect from other hosts."""
        self._allowed.allow(public_key)

    def start(self) -> None:
        """Answer in a thread of its own."""
        self._thread = threading.Thread(target=self._serve, name="frame-server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop answering, close every connection, remove the socket's folder."""
        if self._thread is not None:
            self._stopper.send(_STOP)
            self._thread.join()
            self._thread = None
        self._authenticator.stop()
        self._stopper.close(linger=0)
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self, endpoint: str, heartbeat_s: float, max_frame_bytes: int, is_encrypted: bool = False) -> str:
        """Open one more socket; returns the endpoint with the port that it got."""
        socket = self._context.socket(zmq.ROUTER)
        self._sockets.append(socket)
        set_common_options(socket, heartbeat_s, max_frame_bytes)
        if is_encrypted:
            socket.curve_server = True
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
            socket.zap_domain = ZAP_DOMAIN
            socket.ipv6 = "[" in endpoint
        socket.bind(endpoint)
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _serve(self) -> None:
        stop = self._context.socket(zmq.PAIR)
        stop.connect(self._stop_name)
        polled = [(socket, zmq.POLLIN) for socket in (*self._sockets, stop)]
        while True:
            for socket, _ in zmq.zmq_poll(polled):
                if socket is stop:
                    stop.close(linger=0)
                    return
                self._take(socket)

    def _take(self, socket: zmq.Socket[Any]) -> None:
        peer, parts = socket.recv(), [socket.recv(copy=False)]
        while parts[-1].more:
            parts.append(socket.recv(copy=False))
        key = (id(socket), peer)
        if key in self._dropped:
            return
        frame = parts[0].buffer
        try:
            if len(parts) != 1:
                raise FrameError(
                    f"frame refused: it came in {len(parts)} parts, a frame is one. The sender is at fault."
                )
            answer = self._answer(frame)
        except FrameError as error:
            answer = _refusal("protocol", error, frame)
            self._drop(key)
        except BulkChannelError as error:
            answer = _refusal("bulk", error, frame)
        except StalePlanError as error:
            answer = _refusal("stale plan", error, frame)
        except MoEBitNetError as error:
            answer = _refusal("request", error, frame)
        except Exception as error:
            logger.exception("host %s failed on a frame", self.address.device_name)
            answer = _refusal("failure", error, frame)
        try:
            socket.send(peer, zmq.SNDMORE | zmq.NOBLOCK)
            socket.send(answer, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # the peer is gone, or does not read: its answer is lost, as it would be on the way
            logger.warning("host %s could not answer a peer (%s)", self.address.device_name, error)

    def _drop(self, key: tuple[int, bytes]) -> None:
        """Never listen to a connection again; the oldest are forgotten, their connections have ended by then."""
        logger.warning("host %s drops a connection that broke the protocol", self.address.device_name)
        self._dropped[key] = None
        while len(self._dropped) > _MAX_DROPPED:
            self._dropped.pop(next(iter(self._dropped)))


def _refusal(reason: RefusalReason, error: Exception, frame: memoryview) -> bytes:
    message = str(error) if isinstance(error, MoEBitNetError) else f"{type(error).__name__}: {error}"
    return encode(RefusalFrame(reason, message), peek_request_id(frame))


def _tcp_endpoint(ip: str) -> str:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError as error:
        raise ConfigError(f"FrameServer: ip is {ip!r}; give an IPv4 or IPv6 address of this machine.") from error
    if address.is_unspecified:
        raise ConfigError(f"FrameServer: ip {ip!r} stands for all interfaces; give the one that the cluster uses.")
    return f"tcp://[{ip}]:*" if address.version == 6 else f"tcp://{ip}:*"
