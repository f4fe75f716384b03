"""Rounding as the reference rounds, and float32 as two float16."""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2^23: floats from 2^23 to 2^24 are the integers, so the addition rounds; right for |x| <= 2^22."""
ROUNDER64 = tl.constexpr(6755399441055744.0)
"""1.5 · 2^52, the same for float64."""
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32: what a unit of zero is divided by."""
LOW_PART = tl.constexpr(4096.0)
"""Of a number up to 1, what float16 leaves over is at most 2^-12."""


@triton.jit
def divide(x, divisor):
    """Return ``x / divisor`` rounded correctly; shapes broadcast."""
    return tl.div_rn(x + tl.zeros_like(divisor), divisor + tl.zeros_like(x))


@triton.jit
def round_to_even(x):
    """Return the nearest integers as float32, for ``|x| <= 2^22``."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def to_integers(x, unit):
    """Return ``round(x / unit)`` as float32, half to even; 0 where the unit is 0."""
    return round_to_even(divide(x, tl.maximum(unit, TINY)))


@triton.jit
def split_half(x):
    """Return float16 ``high`` and ``low`` with ``x = high + low / LOW_PART`` to about 2^-24, for ``|x| <= 1``."""
    high = x.to(tl.float16)
    low = ((x - high.to(tl.float32)) * LOW_PART).to(tl.float16)
    return high, low


@triton.jit
def dot_split(left, high, low):
    """Multiply float16 ``[M, K]`` by the ``[K, N]`` that :func:`split_half` split; float32."""
    return tl.dot(left, high) + tl.dot(left, low) * (1.0 / LOW_PART)
