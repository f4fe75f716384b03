"""One connection to an expert host, from its first byte to its loss; a lost one is replaced, never revived.

ZeroMQ tells about the connection on a second socket, the monitor: a killed process is known at once, since its end
closes its sockets; a silent one after ``heartbeat_s``.
"""

from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from cluster.transport.codec import Received, decode
from cluster.transport.header import FrameLimits
from cluster.transport.sockets import HostAddress, KeyPair, set_common_options

_LOSSES = {
    zmq.EVENT_CLOSED: "nothing listens there",
    zmq.EVENT_DISCONNECTED: "the connection ended",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the other end speaks another protocol",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the host does not know this process's key",
}
_EVENTS = sum(_LOSSES)


class HostConnection:
    """Sends frames to one host and receives its answers; for one thread at a time.

    Args:
        context: of ZeroMQ.
        address: where the host listens.
        machine_id: of this machine.
        keys: of this process.
        limits: of answers.
        heartbeat_s: silence after which the connection is lost.
        connect_timeout_s: for connecting and the handshake.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: HostAddress,
        machine_id: str,
        keys: KeyPair,
        limits: FrameLimits,
        heartbeat_s: float,
        connect_timeout_s: float,
    ) -> None:
        self.address = address
        self.loss: str | None = None
        self._limits = limits
        endpoint = address.endpoint_from(machine_id)
        self.is_encrypted = endpoint.startswith("tcp")
        self.socket = context.socket(zmq.DEALER)
        set_common_options(self.socket, heartbeat_s, limits.max_frame_bytes)
        self.socket.reconnect_ivl = -1
        self.socket.connect_timeout = self.socket.handshake_ivl = max(1, int(connect_timeout_s * 1000))
        if self.is_encrypted:
            self.socket.curve_serverkey = address.public_key.encode()
            self.socket.curve_publickey = keys.public.encode()
            self.socket.curve_secretkey = keys.secret.encode()
            self.socket.ipv6 = "[" in endpoint
        self.monitor = self.socket.get_monitor_socket(_EVENTS)
        self.sockets = (self.socket, self.monitor)  # to be polled in this order: answers before losses
        self.socket.connect(endpoint)

    def send(self, frame: bytes) -> None:
        """Send a frame, without waiting; on a lost connection it is lost too, and :attr:`loss` says why."""
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self.loss = self.notice_loss() or "its queue is full"

    def receive(self) -> Received | None:
        """Return the next answer that is here, or ``None``.

        Raises:
            FrameError: the host sent something else than a frame.
        """
        try:
            message = self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return decode(message.buffer, self._limits)

    def notice_loss(self) -> str | None:
        """Read what the monitor has to say; returns why the connection is lost, or ``None``."""
        while self.loss is None and self.monitor.poll(0):
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)["event"]
            self.loss = _LOSSES.get(event)
        return self.loss

    def close(self) -> None:
        """Give up the connection."""
        self.socket.disable_monitor()
        self.socket.close(linger=0)
        self.monitor.close(linger=0)
