"""The numbers behind 4-bit codes: sixteen levels of an element and 256 steps of a group's scale.

Levels come from a formula rounded to int8, so that table lookup (CPU) and evaluation (GPU) give the same integers and
dot products with them stay integer. With t = (2 * code - 15) / 15 running from -1 to 1:

    level = round(127 * (a * t + (1 - a) * t^3)),   a = 0.75

The cubic term spaces the levels more widely where a bell-shaped distribution is thin. On Gaussian data in groups of 32
a lies between 0.65 and 0.70 at best (22.17 dB); 0.75 costs 0.03 dB there and suits the heavier tails of real keys.

Scales are logarithmic, sixteen steps an octave below a base: ``scale = base * 2 ** ((scale_code - 255) / 16)``. One
byte spans sixteen octaves with steps of 4.4 %.
"""

from functools import cache

import torch
from torch import Tensor

NUM_LEVELS = 16
LARGEST_LEVEL = 127
LINEAR_SHARE = 0.75
NUM_SCALE_STEPS = 256
STEPS_PER_OCTAVE = 16


@cache
def levels() -> Tensor:
    """Return the ``[16]`` float32 levels in ascending order: integers, odd-symmetric, the last one 127."""
    t = (2 * torch.arange(NUM_LEVELS, dtype=torch.float64) - (NUM_LEVELS - 1)) / (NUM_LEVELS - 1)
    return (LARGEST_LEVEL * (LINEAR_SHARE * t + (1 - LINEAR_SHARE) * t**3)).round().float()


@cache
def level_boundaries() -> Tensor:
    """Return the ``[15]`` float32 midpoints between neighbouring levels; all exact (multiples of one half)."""
    return (levels()[1:] + levels()[:-1]) / 2


@cache
def level_pairs() -> Tensor:
    """Return ``[256, 2]`` float32: the levels of a byte's low and high nibble."""
    byte = torch.arange(256)
    return torch.stack((levels()[byte % NUM_LEVELS], levels()[byte // NUM_LEVELS]), dim=-1)


@cache
def scale_steps() -> Tensor:
    """Return the ``[256]`` float32 factors of the base, ascending to exactly 1; computed in float64, rounded once."""
    last = NUM_SCALE_STEPS - 1
    return torch.tensor([2.0 ** ((code - last) / STEPS_PER_OCTAVE) for code in range(NUM_SCALE_STEPS)])
