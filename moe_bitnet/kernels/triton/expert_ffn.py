"""The first half of an expert: gate and up in one pass over the int8 rows, with the activation between them.

``inner = activation(gate(x)) · up(x)`` in float32, ``[rows, F]``; the norm, the quantization and ``down`` follow in
:mod:`~moe_bitnet.kernels.triton.quantize` and :mod:`~moe_bitnet.kernels.triton.linear`. The arguments are those of
:mod:`~moe_bitnet.kernels.triton.linear`, with two matrices of one layout. With splits, ``partial`` is int32
``[2, splits, rows, F]`` (gate, up), and ``activate_kernel`` adds, rescales and combines.

The sigmoid is computed in float32 from the hardware's power of two, which is off by at most 2 ulp; the CPU
backends compute it in float64.
"""

import triton
import triton.language as tl

from moe_bitnet.kernels.triton.block_sums import block_sums
from moe_bitnet.kernels.triton.grouping import expert_of_row, locate_tile
from moe_bitnet.kernels.triton.linear import add_splits, field_places, store_sums


@triton.jit
def gated_activation(gate, up, IS_SQUARED_RELU: tl.constexpr):
    """Return ``relu(gate)² · up`` or ``gate · sigmoid(gate) · up``, float32; NaN stays NaN."""
    if IS_SQUARED_RELU:
        positive = tl.where(gate < 0.0, 0.0, gate)
        return positive * positive * up
    else:  # Triton compiles one of the branches, and types what follows a return otherwise
        ones = tl.full(gate.shape, 1.0, tl.float32)
        return gate * tl.div_rn(ones, 1.0 + tl.exp(-gate)) * up


@triton.jit
def store_activated(
    target,
    gate,
    up,
    gate_scale,
    up_scale,
    FIELD: tl.constexpr,
    num_features,
    num_rows,
    row_length,
    IS_SQUARED_RELU: tl.constexpr,
):
    """Rescale the sums of one field of both matrices, combine and store them; see :func:`store_scaled`."""
    offsets, is_there = field_places(FIELD, num_features, num_rows, row_length, gate.shape[0], gate.shape[1])
    gate = gate.to(tl.float32) * gate_scale[None, :]
    up = up.to(tl.float32) * up_scale[None, :]
    tl.store(target + offsets, gated_activation(gate, up, IS_SQUARED_RELU), mask=is_there)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_steps", "steps_per_split", "num_splits"])
def gate_up_kernel(
    x,
    activation_scale,
    row_sums,
    expert_offsets,
    gate_tiles,
    up_tiles,
    gate_scale,
    up_scale,
    inner,
    partial,
    num_rows,
    num_experts,
    in_features,
    out_features,
    num_blocks,
    block_bytes,
    num_steps,
    steps_per_split,
    num_splits,
    IS_BASE3: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    IS_SQUARED_RELU: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Multiply a tile of rows by the same row blocks of gate and up; the module's text describes the arguments."""
    row_group, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert, first_row, last_row = locate_tile(expert_offsets, num_experts, num_rows, tile, BLOCK_TOKENS, MAX_EXPERTS)
    if first_row >= last_row:
        return
    first_block = row_group * ROW_BLOCKS
    first_step = split * steps_per_split
    tokens = tl.arange(0, BLOCK_TOKENS)
    is_row = tokens < last_row - first_row
    excess = tl.zeros([BLOCK_TOKENS], tl.int32)
    if not SUMS_ROWS and split == 0:  # the whole excess is taken off once
        excess = tl.load(row_sums + first_row + tokens, mask=is_row, other=0)
    block = (expert * num_blocks + first_block).to(tl.int64) * block_bytes
    g0, g1, g2, g3, u0, u1, u2, u3 = block_sums(
        x + first_row.to(tl.int64) * in_features,
        last_row - first_row,
        in_features,
        gate_tiles + block,
        up_tiles + block,
        num_blocks - first_block,
        block_bytes,
        first_step,
        tl.minimum(first_step + steps_per_split, num_steps),
        excess,
        IS_BASE3,
        True,
        SUMS_ROWS,
        ROW_BLOCKS,
        BLOCK_TOKENS,
        USE_PTX,
    )
    place = first_row.to(tl.int64) * out_features + first_block * 64
    features, rows = out_features - first_block * 64, last_row - first_row
    if IS_SPLIT:
        gate_sums = partial + place + split.to(tl.int64) * num_rows * out_features
        store_sums(gate_sums, g0, 0, features, rows, out_features)
        store_sums(gate_sums, g1, 1, features, rows, out_features)
        store_sums(gate_sums, g2, 2, features, rows, out_features)
        store_sums(gate_sums, g3, 3, features, rows, out_features)
        up_sums = gate_sums + num_splits.to(tl.int64) * num_rows * out_features
        store_sums(up_sums, u0, 0, features, rows, out_features)
        store_sums(up_sums, u1, 1, features, rows, out_features)
        store_sums(up_sums, u2, 2, features, rows, out_features)
        store_sums(up_sums, u3, 3, features, rows, out_features)
    else:
        scale = tl.load(activation_scale + first_row + tokens, mask=is_row, other=0.0)
        gate_by = scale * tl.load(gate_scale + expert)
        up_by = scale * tl.load(up_scale + expert)
        target = inner + place
        store_activated(target, g0, u0, gate_by, up_by, 0, features, rows, out_features, IS_SQUARED_RELU)
        store_activated(target, g1, u1, gate_by, up_by, 1, features, rows, out_features, IS_SQUARED_RELU)
        store_activated(target, g2, u2, gate_by, up_by, 2, features, rows, out_features, IS_SQUARED_RELU)
        store_activated(target, g3, u3, gate_by, up_by, 3, features, rows, out_features, IS_SQUARED_RELU)


@triton.jit(do_not_specialize=["num_splits", "num_rows", "num_experts"])
def activate_kernel(
    partial,
    activation_scale,
    gate_scale,
    up_scale,
    expert_offsets,
    inner,
    num_splits,
    num_rows,
    num_experts,
    out_features,
    IS_SQUARED_RELU: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Add the shares of gate and up, rescale and combine them; one program a row and ``BLOCK_FEATURES`` features."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    expert = expert_of_row(expert_offsets, num_experts, row, MAX_EXPERTS)
    up_sums = partial + num_splits.to(tl.int64) * num_rows * out_features
    scale = tl.load(activation_scale + row)
    gate = add_splits(partial, num_splits, num_rows, out_features, row, columns).to(tl.float32)
    up = add_splits(up_sums, num_splits, num_rows, out_features, row, columns).to(tl.float32)
    gate = gate * (scale * tl.load(gate_scale + expert))
    up = up * (scale * tl.load(up_scale + expert))
    inner += row * out_features
    tl.store(inner + columns, gated_activation(gate, up, IS_SQUARED_RELU), mask=columns < out_features)
