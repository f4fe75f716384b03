"""Weights that no cache holds: copies that take turns.

A model's next token finds its weights in main memory, since all layers together exceed
the last-level cache. A benchmark of one layer gets the same by rotating through copies.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from benchmarks.machine import last_level_cache_bytes

Item = TypeVar("Item")

MIN_TOTAL_BYTES = 512 * 2**20
_CACHE_MULTIPLE = 16


class Rotation(Generic[Item]):
    """An endless iterator over copies of something large.

    Args:
        make: returns a new copy, with memory of its own.
        num_bytes_each: memory that reading one copy touches.
        total_bytes: memory of all copies; by default 512 MiB or 16 times the last-level cache, whichever is more.
    """

    def __init__(self, make: Callable[[], Item], num_bytes_each: int, total_bytes: int | None = None) -> None:
        total_bytes = default_total_bytes() if total_bytes is None else total_bytes
        num_copies = max(2, -(-total_bytes // num_bytes_each))
        self.copies = [make() for _ in range(num_copies)]
        self._next_index = 0

    def __len__(self) -> int:
        return len(self.copies)

    def __iter__(self) -> "Rotation[Item]":
        return self

    def __next__(self) -> Item:
        """Return the copy that was used longest ago."""
        item = self.copies[self._next_index]
        self._next_index = (self._next_index + 1) % len(self.copies)
        return item


def default_total_bytes() -> int:
    """Return enough memory that the oldest copy has left every cache."""
    return max(MIN_TOTAL_BYTES, _CACHE_MULTIPLE * (last_level_cache_bytes() or 0))
