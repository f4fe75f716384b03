"""How many threads small tensors get."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute with one thread inside the block.

    A small model's decoding gains nothing from a second one, and on a machine that does anything else
    the two wait for each other: 13 ms instead of 0.1 ms for an operation (docs/experiments.md).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
