"""A process group of two, a dispatcher and a host: the way for frames that are too large for an encrypted socket.

CURVE encrypts at about 0.5 GB/s a core; gloo sends the same bytes as they are, five times as fast for half a megabyte
(docs/experiments.md). So it is for networks that one trusts, and used where one asks for it (``bulk_min_bytes``). Every
frame is still announced on the encrypted socket, with its size: nothing is received that was not announced there.

The two ends find each other by exchanging their addresses through whatever the caller has (Ray); no rendezvous server
listens. Each end listens at the address that it is given, and at no other.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_bitnet.errors import HostDownError

_distributed: Any = dist  # torch gives no types for its process groups and stores

DISPATCHER, HOST = 0, 1
"""Ranks in the group."""


class Rendezvous(_distributed.Store):  # type: ignore[misc]
    """Passes the two ends' addresses to each other: what one sets, the other gets.

    Args:
        publish: called with key and value of what this end sets.
        timeout_s: to wait for the other end's value.
    """

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._publish, self._timeout_s = publish, timeout_s
        self._values: dict[str, bytes] = {}
        self._has_changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        """Take a value that the other end has set."""
        with self._has_changed:
            self._values[key] = value
            self._has_changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        """Set a value of this end; called by torch, as are the others below."""
        self.put(key, value)
        self._publish(key, value)

    def get(self, key: str) -> bytes:
        """Wait for a value and return it."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for values."""
        limit_s = self._timeout_s if timeout is None else min(self._timeout_s, timeout.total_seconds())
        with self._has_changed:
            if not self._has_changed.wait_for(lambda: self.check(keys), limit_s):
                raise HostDownError(f"the other end of a bulk channel did not give its address within {limit_s} s.")

    def check(self, keys: list[str]) -> bool:
        """Whether all values are there."""
        return all(key in self._values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for values and return them."""
        return [self.get(key) for key in keys]


class BulkChannel:
    """Moves whole frames between the two ends; for one thread at a time.

    Args:
        rendezvous: by which the ends find each other.
        rank: ``DISPATCHER`` or ``HOST``.
        ip: address of this end to listen at.
        timeout_s: for connecting, and for each frame.

    Raises:
        HostDownError: the other end did not come.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, ip: str, timeout_s: float) -> None:
        self._rank = rank
        self._sending: tuple[Any, torch.Tensor] | None = None
        options = _distributed.ProcessGroupGloo._Options()
        options._devices = [_distributed.ProcessGroupGloo.create_device(hostname=ip)]
        options._timeout = timedelta(seconds=timeout_s)
        try:
            self._group = _distributed.ProcessGroupGloo(rendezvous, rank, 2, options)
        except RuntimeError as error:  # gloo's word for an end that is not there
            raise HostDownError(f"a bulk channel could not be opened ({_first_line(error)}).") from error

    def send(self, frame: bytes) -> None:
        """Begin to send a frame; it goes on while this end does other things.

        Raises:
            HostDownError: the other end is gone, or did not receive the frame before.
        """
        self._finish_sending()
        # a copy, because torch does not take memory that may not be written to; kept until it is sent
        buffer = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        self._sending = (self._start(lambda: self._group.send([buffer], self._other, 0)), buffer)

    def receive(self, num_bytes: int) -> memoryview:
        """Receive a frame of a size that was announced.

        Raises:
            HostDownError: the other end is gone, or does not send.
        """
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._wait(self._start(lambda: self._group.recv([buffer], self._other, 0)))
        return buffer.numpy().data

    @property
    def _other(self) -> int:
        return HOST if self._rank == DISPATCHER else DISPATCHER

    def _finish_sending(self) -> None:
        if self._sending is not None:
            work, _ = self._sending
            self._sending = None
            self._wait(work)

    def _start(self, start: Callable[[], Any]) -> Any:
        try:
            return start()
        except RuntimeError as error:
            raise _broken(error) from error

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise _broken(error) from error


def _broken(error: RuntimeError) -> HostDownError:
    return HostDownError(f"a bulk channel broke ({_first_line(error)}).")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
