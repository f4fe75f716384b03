"""Training and validation batches: the tokens of a split enter, windows of them leave.

::

    tokens        t0 t1 t2 t3 t4 t5 t6 t7 t8 ...       seq_len = 4
    window 0      t0 t1 t2 t3                          targets t1 t2 t3 t4
    window 1                  t4 t5 t6 t7              targets t5 t6 t7 t8

Documents are packed: they follow each other, each closed by the end of text, and windows are cut without regard to
where one ends. No position is padding, and a token may attend to the end of the document before.

A batch is a pure function of the tokens and of (seed, step, rank, world_size, batch size). The workers of a step take
consecutive windows, and steps follow each other; so do the micro-steps that a step may be divided into. A step
therefore sees the same windows whatever the numbers of workers and micro-steps are, and a run resumes at any step by
that number alone, also with others of them.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cluster.training.token_array import Tokens
from moe_bitnet.errors import ConfigError, DataError

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class TokenBatches:
    """Training batches by step number.

    Tokens are divided into windows of ``seq_len`` inputs, each with its successors as targets; a remainder
    at the end is left out. An epoch visits every window once, in an order drawn from (seed, epoch), and the
    ranks of one step take consecutive places of that order. The object only remembers the order of the
    epochs it last used: :meth:`at` may be called with any steps in any order.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, seq_len: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        """Check the sizes; nothing is copied.

        Args:
            tokens: ``[num_tokens]``, int32, from :func:`cluster.training.shards.load_tokens` (a memory map will do).
            batch_size: B, windows of this rank in one step.
            seq_len: S, input tokens of a window.
            seed: of the order of the windows.
            rank: of this worker, 0 to ``world_size - 1``.
            world_size: workers that train together.
        Raises:
            ConfigError: a size is below 1 or ``rank`` is out of range.
            DataError: there are fewer than ``seq_len + 1`` tokens.
        """
        if batch_size < 1 or not 0 <= rank < world_size or seed < 0:
            raise ConfigError(
                f"TokenBatches: batch_size={batch_size}, rank={rank}, world_size={world_size}, seed={seed}. Pass a "
                "batch_size of at least 1, a rank from 0 to world_size - 1 and a seed of at least 0."
            )
        self.num_windows = count_windows(tokens, seq_len)
        self._tokens = tokens
        self._batch_size, self._seq_len, self._seed = batch_size, seq_len, seed
        self._rank, self._world_size = rank, world_size
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which all ranks together visit every window once."""
        return self.num_windows / (self._batch_size * self._world_size)

    def at(self, step: int) -> Batch:
        """Return this rank's batch of a step.

        Args:
            step: counted from 0, without end: epochs follow each other, also inside a batch.
        Returns:
            Inputs and targets, each ``[batch_size, seq_len]``, int64; targets are the inputs' successors.
        Raises:
            ConfigError: ``step`` is negative.
        """
        if step < 0:
            raise ConfigError(f"TokenBatches: step is {step}. Steps are counted from 0.")
        first = (step * self._world_size + self._rank) * self._batch_size
        places = range(first, first + self._batch_size)
        orders = {epoch: self._order(epoch) for epoch in {place // self.num_windows for place in places}}
        self._orders = orders
        windows = np.array([orders[place // self.num_windows][place % self.num_windows] for place in places])
        return _take_windows(self._tokens, windows, self._seq_len)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Draw the order of an epoch.

        Sorting raw random bits, because NumPy keeps the bits of a generator the same in all releases, but not
        ``permutation``: a run must resume under a newer NumPy.
        """
        if epoch in self._orders:
            return self._orders[epoch]
        bits = np.random.PCG64([self._seed, epoch]).random_raw(self.num_windows)
        return np.argsort(bits, kind="stable").astype(np.int64)


def batch_at(
    tokens: Tokens, step: int, batch_size: int, seq_len: int, seed: int = 0, rank: int = 0, world_size: int = 1
) -> Batch:
    """Return the batch of one step, as ``TokenBatches(...).at(step)``; the class is faster for many steps."""
    return TokenBatches(tokens, batch_size, seq_len, seed, rank, world_size).at(step)


def validation_batches(
    tokens: Tokens, batch_size: int, seq_len: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """Return an iterator over windows spread evenly over the text, the same on every call.

    The first windows alone would be a handful of documents, which may be like no others.

    Args:
        tokens: ``[num_tokens]``, int32.
        batch_size: B, windows in a batch; the last batch may have fewer.
        seq_len: S, input tokens of a window.
        max_windows: how many windows to take at most; None takes all.
    Returns:
        Batches of inputs and targets, each ``[<= batch_size, seq_len]``, int64.
    Raises:
        ConfigError: a size is below 1.
        DataError: there are fewer than ``seq_len + 1`` tokens.
    """
    num_held = count_windows(tokens, seq_len)
    num_windows = num_held if max_windows is None else min(num_held, max_windows)
    if batch_size < 1 or num_windows < 1:
        raise ConfigError(
            f"validation_batches: batch_size={batch_size}, max_windows={max_windows}. Pass at least 1 of each."
        )
    windows = np.arange(num_windows) * num_held // num_windows
    starts = range(0, num_windows, batch_size)
    return (_take_windows(tokens, windows[start : start + batch_size], seq_len) for start in starts)


def count_windows(tokens: Tokens, seq_len: int) -> int:
    """Return how many windows of ``seq_len`` inputs and their targets follow each other in ``tokens``.

    Raises:
        ConfigError: ``seq_len`` is below 1.
        DataError: not even one window fits.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len is {seq_len}. Pass at least 1.")
    num_windows = (len(tokens) - 1) // seq_len
    if num_windows < 1:
        raise DataError(
            f"{len(tokens)} tokens are too few for one window of seq_len={seq_len} and its targets. Pass more text, or "
            f"a seq_len below {max(len(tokens), 2)}."
        )
    return num_windows


def _take_windows(tokens: Tokens, windows: npt.NDArray[np.int64], seq_len: int) -> Batch:
    indices = windows[:, None] * seq_len + np.arange(seq_len + 1)  # [batch_size, seq_len + 1]
    taken = np.asarray(tokens[indices]).astype(np.int64)
    return np.ascontiguousarray(taken[:, :-1]), np.ascontiguousarray(taken[:, 1:])
