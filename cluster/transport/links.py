"""Connections from one process to all expert hosts: who is up, frames to many, answers in any order.

A host that is lost, or slower than the time-out, is down. It is tried again after ``retry_after_s``: a probe goes out,
and when it comes back the host is up. Nothing waits for that.
"""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import zmq

from cluster.config import ClusterConfig
from cluster.transport.bulk import BulkChannel
from cluster.transport.codec import Frame, decode, encode
from cluster.transport.connection import HostConnection
from cluster.transport.frames import BulkFrame, CombineFrame, DispatchFrame, ProbeFrame, RefusalFrame
from cluster.transport.header import FrameLimits
from cluster.transport.sockets import HostAddress, KeyPair
from moe_bitnet.errors import ClusterError, FrameError, HostDownError, StalePlanError

logger = logging.getLogger(__name__)

_LARGEST_REQUEST_ID = 2**32 - 1


@dataclass(frozen=True)
class LinkTimes:
    """Seconds after which something counts as down; see :class:`cluster.config.ClusterConfig`."""

    connect_timeout_s: float = 30.0
    request_timeout_s: float = 30.0
    retry_after_s: float = 1.0
    heartbeat_s: float = 0.6

    @classmethod
    def of(cls, config: ClusterConfig) -> "LinkTimes":
        """Take the times of a configuration."""
        return cls(config.connect_timeout_s, config.request_timeout_s, config.retry_after_s, config.heartbeat_s)


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one request.

    Attributes:
        device_name: which host it went to.
        frame: the answer, or ``None``.
        error: why there is none: :class:`HostDownError` (ask another copy), :class:`StalePlanError` (ask by the new
            plan) or another :class:`ClusterError` (asking again does not help).
    """

    device_name: str
    frame: CombineFrame | None
    error: ClusterError | None = None


@dataclass(frozen=True, eq=False)
class BulkPath:
    """Another way to a host, for large frames.

    Attributes:
        channel: this end of it.
        channel_id: by which the host knows it.
        min_bytes: smaller frames go by the socket.
    """

    channel: BulkChannel
    channel_id: int
    min_bytes: int


@dataclass(eq=False)
class _Link:
    """A host as this process sees it."""

    address: HostAddress
    connection: HostConnection
    down_since_s: float | None = None
    was_probed: bool = False  # since it went down
    bulk: BulkPath | None = None


class HostLinks:
    """Connections to hosts by the names of their devices; for one thread at a time.

    Args:
        machine_id: of this machine; hosts with the same are reached by Unix sockets.
        keys: of this process; the hosts must allow its public key.
        limits: of answers.
        times: time-outs.
    """

    def __init__(self, machine_id: str, keys: KeyPair, limits: FrameLimits, times: LinkTimes) -> None:
        self._machine_id, self._keys, self._limits, self.times = machine_id, keys, limits, times
        self._context = zmq.Context()
        self._links: dict[str, _Link] = {}
        self._request_ids = itertools.cycle(range(1, _LARGEST_REQUEST_ID + 1))

    def set_addresses(self, addresses: Iterable[HostAddress]) -> None:
        """Connect to hosts that are new or have moved, and leave those that are not named any more."""
        wanted = {address.device_name: address for address in addresses}
        for name in list(self._links):
            if wanted.get(name) != self._links[name].address:
                self._links.pop(name).connection.close()
        for name, address in wanted.items():
            if name not in self._links:
                self._links[name] = _Link(address, self._connect(address))

    def close(self) -> None:
        """End all connections."""
        self.set_addresses([])
        self._context.term()

    def use_bulk(self, name: str, path: BulkPath) -> None:
        """Send large frames to a host another way, until that breaks."""
        self._links[name].bulk = path

    def has_bulk(self, name: str) -> bool:
        """Whether large frames to a host go another way."""
        return self._links[name].bulk is not None

    def is_encrypted(self, name: str) -> bool:
        """Whether the connection to a host uses CURVE."""
        return self._links[name].connection.is_encrypted

    def is_up(self, name: str) -> bool:
        """Whether a host can be asked; one that was down is tried again now and then."""
        link = self._links.get(name)
        if link is None:
            return False
        if link.down_since_s is not None:
            self._try_again(link)
        return link.down_since_s is None

    def send(self, name: str, frame: DispatchFrame) -> int:
        """Send a frame without waiting; returns its request id.

        Raises:
            ClusterError: the frame is larger than a host takes.
        """
        request_id = next(self._request_ids)
        encoded = encode(frame, request_id)
        if len(encoded) > self._limits.max_frame_bytes:  # the host would end the connection, and seem to be down
            raise ClusterError(
                f"a frame of {len(encoded)} bytes for host {name!r} was not sent: the limit is "
                f"{self._limits.max_frame_bytes}. Run fewer tokens at once."
            )
        self._send_encoded(self._links[name], encoded, request_id)
        return request_id

    def wait(self, requests: Mapping[str, int]) -> Iterator[Answer]:
        """Wait for the answers to one request each of some hosts, and yield them as they come.

        Args:
            requests: device name → request id of :meth:`send`.
        """
        open_requests = dict(requests)
        deadline_s = time.monotonic() + self.times.request_timeout_s
        for name in requests:
            loss = self._links[name].connection.loss
            if loss is not None:  # noticed already, so that no event will come
                del open_requests[name]
                yield self._set_down(name, loss)
        while open_requests:
            remaining_s = deadline_s - time.monotonic()
            names = {socket: name for name in open_requests for socket in self._links[name].connection.sockets}
            # without a Poller, which would cost more than this call: register and unregister every time
            polled = [(socket, zmq.POLLIN) for socket in names]
            ready = zmq.zmq_poll(polled, int(remaining_s * 1000) + 1) if remaining_s > 0 else []
            if not ready:
                yield from [self._set_down(name, "it did not answer in time") for name in open_requests]
                return
            for socket, _ in ready:
                name = names[socket]
                if name not in open_requests:
                    continue
                answer = self._look(name, socket, open_requests[name])
                if answer is not None:
                    del open_requests[name]
                    yield answer

    def probe(self, name: str) -> float:
        """Ask a host whether it is there; returns the round trip in seconds.

        Raises:
            HostDownError: it does not answer.
        """
        link = self._links[name]
        start_s = time.perf_counter()
        request_id = self._send_probe(link)
        while request_id not in self._read_probes(link):
            remaining_s = self.times.request_timeout_s - (time.perf_counter() - start_s)
            if remaining_s <= 0 or link.connection.notice_loss():
                raise self._down(name, link.connection.loss or "it did not answer in time")
            link.connection.socket.poll(int(min(remaining_s * 1000, 20)))
        link.down_since_s = None
        return time.perf_counter() - start_s

    def _send_encoded(self, link: _Link, encoded: bytes, request_id: int) -> None:
        bulk = link.bulk
        if bulk is None or len(encoded) < bulk.min_bytes:
            link.connection.send(encoded)
            return
        link.connection.send(encode(BulkFrame(len(encoded), bulk.channel_id), request_id))
        try:
            bulk.channel.send(encoded)
        except HostDownError as error:  # the host will say so too, and the frame is sent again
            self._leave_bulk(link, str(error))

    def _leave_bulk(self, link: _Link, why: str) -> None:
        logger.warning("host %s gets large frames by its socket again: %s", link.address.device_name, why)
        link.bulk = None

    def _connect(self, address: HostAddress) -> HostConnection:
        return HostConnection(
            self._context,
            address,
            self._machine_id,
            self._keys,
            self._limits,
            self.times.heartbeat_s,
            self.times.connect_timeout_s,
        )

    def _look(self, name: str, socket: zmq.Socket[Any], request_id: int) -> Answer | None:
        """Take what one socket of a host has to say about a request."""
        link = self._links[name]
        if socket is link.connection.monitor:
            loss = link.connection.notice_loss()
            return self._set_down(name, loss) if loss else None
        try:
            received = link.connection.receive()
        except FrameError as error:
            link.connection.loss = "it sent damaged bytes"
            self._set_down(name, link.connection.loss)
            return Answer(name, None, error)
        if received is None:
            return None
        frame = received.frame
        if isinstance(frame, BulkFrame):  # even a late one must be taken out of the channel
            try:
                frame = self._receive_bulk(link, frame)
            except (HostDownError, FrameError) as error:
                self._leave_bulk(link, str(error))
                return Answer(name, None, HostDownError(str(error))) if received.request_id == request_id else None
        if received.request_id != request_id:
            return None  # a late answer to an older request
        return self._read(name, frame)

    def _receive_bulk(self, link: _Link, announced: BulkFrame) -> Frame:
        if link.bulk is None or announced.channel_id != link.bulk.channel_id:
            raise HostDownError("an answer was announced for a bulk channel that is closed.")
        return decode(link.bulk.channel.receive(announced.num_bytes), self._limits).frame

    def _read(self, name: str, frame: Frame) -> Answer:
        if isinstance(frame, CombineFrame):
            return Answer(name, frame)
        if isinstance(frame, RefusalFrame):
            if frame.reason == "bulk":
                self._leave_bulk(self._links[name], frame.message)
                return Answer(name, None, HostDownError(frame.message))  # asked again, by the socket
            if frame.reason == "protocol":
                self._links[name].connection.loss = "it dropped the connection"  # it does not listen to it any more
                self._set_down(name, "it dropped the connection")
            kind = {"protocol": FrameError, "stale plan": StalePlanError}.get(frame.reason, ClusterError)
            message = frame.message if frame.reason != "failure" else f"host {name!r} failed: {frame.message}"
            return Answer(name, None, kind(message))
        return Answer(name, None, FrameError(f"host {name!r} answered rows with a {type(frame).__name__}."))

    def _set_down(self, name: str, why: str) -> Answer:
        return Answer(name, None, self._down(name, why))

    def _down(self, name: str, why: str) -> HostDownError:
        link = self._links[name]
        link.down_since_s, link.was_probed = time.monotonic(), False
        error = HostDownError(
            f"host {name!r} is down ({why}). It is tried again every {self.times.retry_after_s} s; "
            f"start it again if it died, or raise request_timeout_s if it is slow."
        )
        logger.warning("%s", error)
        return error

    def _try_again(self, link: _Link) -> None:
        assert link.down_since_s is not None
        if self._read_probes(link) and link.was_probed:  # the answer to any of them, however late, is a sign of life
            link.down_since_s = None
            logger.info("host %s is up again", link.address.device_name)
            return
        if time.monotonic() - link.down_since_s < self.times.retry_after_s:
            return
        if link.connection.notice_loss():
            link.connection.close()
            link.connection = self._connect(link.address)
        link.down_since_s, link.was_probed = time.monotonic(), True
        self._send_probe(link)

    def _send_probe(self, link: _Link) -> int:
        request_id = next(self._request_ids)
        link.connection.send(encode(ProbeFrame(), request_id))
        return request_id

    def _read_probes(self, link: _Link) -> list[int]:
        """Read all that a host sent; returns the request ids of the probes that came back."""
        answered = []
        try:
            while (received := link.connection.receive()) is not None:
                if isinstance(received.frame, ProbeFrame):
                    answered.append(received.request_id)
        except FrameError:
            link.connection.loss = "it sent damaged bytes"
        return answered
