"""Rows of floats to int8, with or without a norm before, one program a row.

The integers and scales of ``quantize_kernel`` without a norm are those of :mod:`moe_bitnet.quantization` bit for bit:
divisions are correctly rounded, and adding 1.5 · 2^23 rounds to the nearest even integer.

The norm is computed in float32, where the CPU backends use float64: a GPU for consumers has one float64 unit for 64 of
float32. Its factor can so differ in the last bits from theirs, and an int8 value that lies next to a tie by one. A sum
of squares that float32 cannot hold (from values beyond about 10^18) makes the scale NaN, as does a row that is not
finite.
"""

import triton
import triton.language as tl

from moe_bitnet.kernels.triton.grouping import expert_of_row

MIN_ABSMAX = tl.constexpr(1e-5)
"""``quantization.MIN_SCALE``: rows of zeros keep a finite scale."""
ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2^23: floats from 2^23 to 2^24 are the integers, so the addition rounds; right for |x| <= 2^22."""
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x):
    """Return the bits of ``|x|`` as int32: ordered like the magnitudes, with infinity and then NaN above all numbers.

    A maximum of floats may drop a NaN; a maximum of these does not.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_int8(x, scale):
    """Return ``round(x / scale)`` as int8, half to even; 0 if the scale is not finite."""
    rounded = (tl.div_rn(x, scale + tl.zeros(x.shape, tl.float32)) + ROUNDER) - ROUNDER
    is_finite = magnitude_bits(scale) < INFINITY_BITS
    return tl.where(is_finite, rounded, 0.0).to(tl.int8)


@triton.jit
def load_normalized(source, gain, columns, num_features, factor, HAS_NORM: tl.constexpr):
    """Load float32 values of a row and, with a norm, multiply them by its factor and then their gain."""
    is_column = columns < num_features
    x = tl.load(source + columns, mask=is_column, other=0.0).to(tl.float32)
    if HAS_NORM:
        x = (x * factor) * tl.load(gain + columns, mask=is_column, other=0.0)
    return x


@triton.jit
def norm_factor(source, num_features, eps, BLOCK: tl.constexpr):
    """Return ``1 / sqrt(mean square + eps)`` of a row in float32; NaN if the sum of squares is not finite."""
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(source + columns, mask=columns < num_features, other=0.0).to(tl.float32)
        squares += x * x
    count = tl.zeros([], tl.float32) + num_features
    mean_square = tl.div_rn(tl.sum(squares, axis=0), count)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    return tl.where(magnitude_bits(mean_square) < INFINITY_BITS, factor, float("nan"))


@triton.jit(do_not_specialize=["num_experts"])
def quantize_kernel(
    x,
    norm_weight,
    expert_offsets,
    x_q,
    activation_scale,
    row_sums,
    num_experts,
    num_features,
    eps,
    HAS_NORM: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize the row of this program.

    Args:
        x: float ``[rows, num_features]``.
        norm_weight: float32 ``[num_experts, num_features]``, or ``[num_features]`` without groups; with ``HAS_NORM``.
        expert_offsets: int64 ``[num_experts + 1]``, with ``IS_GROUPED``.
        x_q: int8, like ``x``; written.
        activation_scale: float32 ``[rows]``; written.
        row_sums: int32 ``[rows]``, sums of ``x_q``; written with ``SUMS_ROWS``.
        num_experts: how many experts.
        num_features: row length.
        eps: float32, added to the mean square.
        HAS_NORM: normalize first.
        IS_GROUPED: the gain is that of the row's expert.
        SUMS_ROWS: write ``row_sums``.
        MAX_EXPERTS: a power of two, at least ``num_experts``.
        BLOCK: values at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    source = x + row * num_features
    gain = norm_weight
    factor = 1.0
    if IS_GROUPED:
        gain += expert_of_row(expert_offsets, num_experts, row, MAX_EXPERTS).to(tl.int64) * num_features
    if HAS_NORM:
        factor = norm_factor(source, num_features, eps, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        largest = tl.maximum(
            largest, magnitude_bits(load_normalized(source, gain, columns, num_features, factor, HAS_NORM))
        )
    absmax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(absmax < MIN_ABSMAX, MIN_ABSMAX, absmax), 127.0)
    sums = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = to_int8(load_normalized(source, gain, columns, num_features, factor, HAS_NORM), scale)
        tl.store(x_q + row * num_features + columns, values, mask=columns < num_features)
        if SUMS_ROWS:
            sums += values.to(tl.int32)
    tl.store(activation_scale + row, scale)
    if SUMS_ROWS:
        tl.store(row_sums + row, tl.sum(sums, axis=0))


@triton.jit
def row_sums_kernel(x_q, row_sums, num_features, BLOCK: tl.constexpr):
    """Add up the int8 values of the row of this program."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        sums += tl.load(x_q + row * num_features + columns, mask=columns < num_features, other=0).to(tl.int32)
    tl.store(row_sums + row, tl.sum(sums, axis=0))
