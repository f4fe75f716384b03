"""The trellis encoder for many rows and any table of levels: what experiments need and the kernels do not offer.

The formula is that of ``kvcache/trellis.py``; here the rows lie along the fastest axis, so that each step is a handful
of long vector operations.
"""

import torch
from torch import Tensor

from kvcache.trellis import NUM_WINDOWS, WINDOW_BITS

# Rows whose 64 path costs stay in a core's cache.
_ROWS = 2048


def encode_windows(x: Tensor, levels: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Find the windows of least squared error.

    Args:
        x: float32 ``[num_rows, num_elements]``, in units of ``levels``.
        levels: float32 ``[64]``, by window.
        num_bits: 4, 2 or 1.

    Returns:
        int64 windows ``[num_rows, num_elements]``, and float32 squared errors ``[num_rows]``.
    """
    parts = [_encode(part, levels, num_bits) for part in x.split(_ROWS)]
    return torch.cat([windows for windows, _ in parts]), torch.cat([error for _, error in parts])


def nearest_path_levels(x: Tensor, levels: Tensor, num_bits: int) -> Tensor:
    """Return the levels of the best windows of ``[..., num_elements]``, in the shape of ``x``."""
    windows, _ = encode_windows(x.flatten(0, -2), levels, num_bits)
    return levels[windows].reshape(x.shape)


def _encode(x: Tensor, levels: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    num_states, num_branches = NUM_WINDOWS >> num_bits, 1 << num_bits
    elements = x.T.contiguous()  # [num_elements, rows]
    cost = torch.full((num_states, elements.shape[1]), 1e30)
    cost[0] = 0
    chosen = torch.empty((len(elements), *cost.shape), dtype=torch.uint8)
    for index in reversed(range(len(elements))):
        path_cost = (elements[index] - levels.unsqueeze(1)).square_()  # [windows, rows]
        path_cost.view(num_states, num_branches, -1).add_(cost.unsqueeze(1))  # window >> num_bits: the state before
        path_cost = path_cost.view(num_branches, num_states, -1)  # the lowest bits of a window: the state after
        cost = path_cost.amin(dim=0)
        chosen[index] = _first_branch(path_cost, cost)
    squared_error, state = cost.min(dim=0)
    windows = torch.empty(elements.shape, dtype=torch.int64)
    for index in range(len(elements)):
        branch = chosen[index].gather(0, state.unsqueeze(0)).squeeze(0)
        windows[index] = state | branch.long() << (WINDOW_BITS - num_bits)
        state = windows[index] >> num_bits
    return windows.T.contiguous(), squared_error


def _first_branch(path_cost: Tensor, cost: Tensor) -> Tensor:
    """Return which of the branches ``[branches, states, rows]`` costs ``cost``; uint8 ``[states, rows]``."""
    branch = torch.zeros(cost.shape, dtype=torch.uint8)
    for index in reversed(range(1, len(path_cost))):
        branch.masked_fill_(path_cost[index] == cost, index)
    return branch.masked_fill_(path_cost[0] == cost, 0)
