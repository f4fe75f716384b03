"""The host's end of bulk channels: frames that come and go that way, each announced on a socket."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future

from cluster.transport.bulk import HOST, BulkChannel, Rendezvous
from cluster.transport.codec import Buffer, decode, encode
from cluster.transport.frames import BulkFrame
from cluster.transport.header import FrameLimits, is_bulk
from moe_bitnet.errors import BulkChannelError, HostDownError


class BulkHost:
    """Answers frames from sockets as well as from bulk channels.

    Args:
        answer: frame → answer, as :meth:`cluster.expert_host.ExpertHost.answer`.
        limits: of frames.
    """

    def __init__(self, answer: Callable[[Buffer], bytes], limits: FrameLimits) -> None:
        self._answer, self._limits = answer, limits
        self._channels: dict[int, Future[BulkChannel]] = {}
        self._rendezvous: dict[int, Rendezvous] = {}
        self._channel_ids = itertools.count(1)

    def open(self, ip: str, timeout_s: float) -> tuple[int, list[tuple[str, bytes]]]:
        """Begin to open a channel in a thread.

        Args:
            ip: of this machine, to listen at.
            timeout_s: for connecting, and for each frame.
        Returns:
            the channel's id, and what the dispatcher's end must know: keys and values.
        Raises:
            HostDownError: nothing to tell came up in time.
        """
        channel_id = next(self._channel_ids)
        published: list[tuple[str, bytes]] = []
        has_published = threading.Event()

        def publish(key: str, value: bytes) -> None:
            published.append((key, value))
            has_published.set()

        rendezvous = self._rendezvous[channel_id] = Rendezvous(publish, timeout_s)
        channel = self._channels[channel_id] = Future[BulkChannel]()

        def work() -> None:
            try:
                channel.set_result(BulkChannel(rendezvous, HOST, ip, timeout_s))
            except HostDownError as error:
                channel.set_exception(error)
            finally:
                del self._rendezvous[channel_id]

        threading.Thread(target=work, name="bulk-channel", daemon=True).start()
        if not has_published.wait(timeout_s):
            raise HostDownError(f"a bulk channel could not be opened at {ip} within {timeout_s} s.")
        return channel_id, published

    def put(self, channel_id: int, key: str, value: bytes) -> None:
        """Take what the dispatcher's end has published."""
        rendezvous = self._rendezvous.get(channel_id)
        if rendezvous is not None:
            rendezvous.put(key, value)

    def answer(self, frame: memoryview) -> bytes:
        """Answer a frame, or the one that a bulk frame announces.

        Raises:
            BulkChannelError: the channel is broken; the dispatcher sends the frame by the socket.
            ClusterError: as the ``answer`` that was given.
        """
        if not is_bulk(frame):
            return self._answer(frame)
        received = decode(frame, self._limits)
        assert isinstance(received.frame, BulkFrame)
        channel_id = received.frame.channel_id
        opening = self._channels.get(channel_id)
        if opening is None:
            raise BulkChannelError(f"no bulk channel {channel_id} is open here. Send the frame by the socket.")
        try:
            channel = opening.result()  # in a moment: the other end has it already
            answer = self._answer(channel.receive(received.frame.num_bytes))
            channel.send(answer)
        except HostDownError as error:
            del self._channels[channel_id]
            raise BulkChannelError(str(error)) from error
        return encode(BulkFrame(len(answer), channel_id), received.request_id)
