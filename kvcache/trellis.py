"""Trellis codes of 4, 2 and 1 bits: an element's level depends on its own bits and on those of its neighbours.

In: rows of numbers in units of levels, best with a standard deviation of ``1 / LEVEL_UNIT``. Out: rows of codes, b bits
an element, and the levels, int8, that they stand for. An element's level is looked up with the six bits of the row's
bit stream that begin with its own:

    element          0    1    2    3            4 bits: window of element 0 = its 4 bits and 2 bits of element 1
    stream         |3210|3210|3210|3210|...      2 bits: its 2 bits and those of the next two elements
    window of 1         |543210|                 1 bit:  its bit and those of the next five elements

Bits behind the end are zero. The decoder is one lookup, as for a plain code; but neighbours shape each other's choice
of levels, which lowers the squared error on Gaussian data to 21.6, 10.7 and 5.2 dB at 4, 2 and 1 bits; the best plain
codes (Lloyd-Max) reach 20.2, 9.3 and 4.4 dB. The encoder finds the best row of codes with Viterbi's algorithm.

``LEVELS`` were fitted with Lloyd's iteration on Gaussian rows: ``python -m benchmarks.kv_trellis``.

Source: Marcellin and Fischer 1990 (trellis-coded quantization); Tseng et al. 2024, arXiv:2406.11235 (bit-shift
trellis).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

WINDOW_BITS = 6
NUM_WINDOWS = 1 << WINDOW_BITS
LARGEST_LEVEL = 127

# One standard deviation is 1 / LEVEL_UNIT levels: level 127 lies at 3.4 deviations.
LEVEL_UNIT = 3.4 / LARGEST_LEVEL

KEPT_SHARE = {8: 1.0, 4: 0.993, 2: 0.914, 1: 0.697}
"""What a level keeps of a Gaussian element on average: the mean of ``x * level`` over that of ``x * x``.

Levels are the means of the elements that they stand for, so they are shorter than these: by the share of the variance
that is lost, the least squared error's price. ``calibration.py`` gives it back.
"""

# fmt: off
LEVELS: dict[int, tuple[int, ...]] = {
    4: (
        -15, 22, 17, -65, 60, -7, 95, 71, 32, 7, 39, -24, 49, -120, 0, -40,
        -55, 37, 50, -3, 16, -37, -46, -31, -9, 26, -25, -13, 74, -20, 3, 10,
        24, -47, -60, 32, -4, -74, 10, 2, 41, 56, -15, 19, -27, 83, -35, -90,
        5, -30, -81, -49, -40, 15, -6, 45, -21, -13, 64, -103, -68, -56, 28, 116,
    ),
    2: (
        11, -50, 50, -14, 51, 14, -13, -50, 30, 1, -66, -28, 12, 79, -19, 35,
        -76, 24, -6, -36, -28, 62, 27, 2, -41, 37, 15, -9, -44, 49, 15, -12,
        -24, 58, 23, 6, 20, -44, -96, -11, 46, -26, 98, 7, -13, 21, -54, 64,
        35, -3, -35, -75, 6, -16, -47, 41, 1, -63, -26, 36, 79, -3, -29, 24,
    ),
    1: (
        -27, 30, -28, 24, 12, -42, -16, 38, 19, -21, 32, -19, -8, 54, -28, 27,
        -53, 9, 60, 0, 69, -7, 25, -24, 16, -43, -27, 24, 31, -24, -67, 2,
        63, -6, 14, -45, -18, 31, 37, -17, 23, -20, -18, 28, -67, -3, 30, -21,
        14, -37, 9, -45, -66, 12, -19, 30, -37, 19, 34, -21, -25, 25, -8, 62,
    ),
}
# fmt: on


@dataclass(frozen=True)
class EncodedRows:
    """What the encoder chose.

    Attributes:
        codes: uint8 ``[num_rows, num_elements]``, values below ``2 ** num_bits``.
        levels: float32 ``[num_rows, num_elements]``, integers.
        squared_error: float32 ``[num_rows]``, summed from the last element to the first.
    """

    codes: Tensor
    levels: Tensor
    squared_error: Tensor


@cache
def all_levels() -> Tensor:
    """Return int8 ``[192]``: the levels of 4, then of 2, then of 1 bits by window, as kernels take them."""
    return torch.tensor([LEVELS[num_bits] for num_bits in (4, 2, 1)], dtype=torch.int8).flatten()


@cache
def level_table(num_bits: int) -> Tensor:
    """Return the ``[64]`` float32 levels by window of 4, 2 or 1 bits."""
    return torch.tensor(LEVELS[num_bits], dtype=torch.float32)


def encode_rows(x: Tensor, num_bits: int) -> EncodedRows:
    """Find the codes of least squared error.

    All arithmetic is float32 in the order of the formula, so that every backend chooses the same codes.

    Args:
        x: float32 ``[num_rows, num_elements]``, in units of levels.
        num_bits: 4, 2 or 1.
    """
    num_rows, num_elements = x.shape
    num_states, num_branches = NUM_WINDOWS >> num_bits, 1 << num_bits
    # windows that lead to a state, by the bits that leave it: [states, branches]
    windows = torch.arange(num_states)[:, None] + torch.arange(num_branches) * num_states
    levels = level_table(num_bits)
    cost = torch.full((num_rows, num_states), 1e30)
    cost[:, 0] = 0
    chosen = torch.empty(num_elements, num_rows, num_states, dtype=torch.int64)
    for element in reversed(range(num_elements)):
        distance = x[:, element, None] - levels  # [rows, windows]
        path_cost = (distance * distance + cost.repeat_interleave(num_branches, dim=1))[:, windows]
        branch = _first_smallest(path_cost)
        chosen[element] = windows[torch.arange(num_states), branch]
        cost = path_cost.gather(2, branch.unsqueeze(2)).squeeze(2)
    state = _first_smallest(cost)
    squared_error = cost.gather(1, state.unsqueeze(1)).squeeze(1)
    row_windows = torch.empty(num_rows, num_elements, dtype=torch.int64)
    for element in range(num_elements):
        window = chosen[element].gather(1, state.unsqueeze(1)).squeeze(1)
        row_windows[:, element] = window
        state = window >> num_bits
    codes = (row_windows & (num_branches - 1)).to(torch.uint8)
    return EncodedRows(codes, levels[row_windows], squared_error)


def decode_rows(codes: Tensor, num_bits: int) -> Tensor:
    """Look up the levels of codes.

    Args:
        codes: uint8 ``[num_rows, num_elements]``.
        num_bits: 4, 2 or 1.

    Returns:
        float32 ``[num_rows, num_elements]``, integers.
    """
    num_following = WINDOW_BITS // num_bits + (WINDOW_BITS % num_bits > 0) - 1
    padded = torch.nn.functional.pad(codes.long(), (0, num_following))
    windows = sum(padded[:, shift : shift + codes.shape[1]] << (shift * num_bits) for shift in range(num_following + 1))
    return level_table(num_bits)[windows & (NUM_WINDOWS - 1)]


def _first_smallest(x: Tensor) -> Tensor:
    """Return the index of the first smallest element along the last axis (``argmin`` may return any)."""
    is_smallest = x == x.amin(dim=-1, keepdim=True)
    return is_smallest.int().argmax(dim=-1)  # the first of equal maxima
