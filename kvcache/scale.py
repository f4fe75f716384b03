"""One-byte scales: sixteen steps an octave over sixteen octaves, the same for every page.

``scale(code) = 2 ** (code / 16 - 13)``: 0.00012 to 7.7, for vectors whose channels have a root mean square of about
0.005 to 290. Calibrated frames bring every vector to about 1. Larger vectors are clipped at the largest scale.
"""

from functools import cache

import torch
from torch import Tensor

NUM_SCALES = 256
STEPS_PER_OCTAVE = 16
OCTAVES_BELOW_ONE = 13


@cache
def scales() -> Tensor:
    """Return the ``[256]`` float32 scales, ascending; computed in float64, rounded once."""
    codes = torch.arange(NUM_SCALES, dtype=torch.float64)
    return torch.exp2(codes / STEPS_PER_OCTAVE - OCTAVES_BELOW_ONE).float()


def nearest_scale_code(scale: Tensor) -> Tensor:
    """Return the code next to a scale on the logarithmic grid.

    Args:
        scale: float64, any shape, not negative.

    Returns:
        int64 codes in 0..255; 0 for a scale of zero.
    """
    steps = (scale.clamp(min=1e-30).log2() + OCTAVES_BELOW_ONE) * STEPS_PER_OCTAVE
    return steps.round().clamp(0, NUM_SCALES - 1).long()


def covering_scale_code(largest: Tensor, largest_level: int) -> Tensor:
    """Return the smallest code whose scale times ``largest_level`` reaches ``largest``; 255 if none does.

    Args:
        largest: float32, any shape, not negative.
        largest_level: such as 127.
    """
    return torch.searchsorted(scales() * largest_level, largest).clamp(max=NUM_SCALES - 1)
