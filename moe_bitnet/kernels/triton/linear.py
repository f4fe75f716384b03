"""Rows of x by a ternary matrix, or each row by the matrix of its expert, in one launch for all experts.

Grid: groups of row blocks x tiles of rows x splits of the inputs. With one split a program rescales its exact sums and
writes float32. With more it writes int32 sums of its share of the inputs, and a second kernel adds the shares and
rescales: that keeps every multiprocessor busy when a batch of few rows makes few tiles, and integers can be added in
any order without changing a bit.

==================  ===========================  ==========================================================
argument            shape, dtype                 meaning
==================  ===========================  ==========================================================
x                   [rows, in] int8              rows sorted by expert
activation_scale    [rows] float32
row_sums            [rows] int32                 sums of x, unless the program makes its own
expert_offsets      [experts + 1] int64          unless there is one matrix
tiles               [experts, blocks, bytes] u8  see :mod:`moe_bitnet.tiles`
weight_scale        [experts] float32
output              [rows, out] float32          with one split
partial             [splits, rows, out] int32    with more
==================  ===========================  ==========================================================
"""

import triton
import triton.language as tl

from moe_bitnet.kernels.triton.block_sums import block_sums
from moe_bitnet.kernels.triton.grouping import expert_of_row, locate_tile


@triton.jit
def field_places(FIELD: tl.constexpr, num_features, num_rows, row_length, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Say where the sums of field or digit ``FIELD`` go: feature ``64·block + 16·FIELD + r``.

    Args:
        FIELD: 0 … 3.
        num_features: features that there are from the program's first.
        num_rows: rows that there are from the program's first.
        row_length: of the output.
        ROWS: 16 times the row blocks.
        TOKENS: rows of x.
    Returns:
        Offsets from the program's first output, int32 ``[ROWS, TOKENS]``, and whether they are there.
    """
    places = tl.arange(0, ROWS)
    features = places // 16 * 64 + FIELD * 16 + places % 16
    tokens = tl.arange(0, TOKENS)
    is_there = (features < num_features)[:, None] & (tokens < num_rows)[None, :]
    return tokens[None, :] * row_length + features[:, None], is_there


@triton.jit
def store_sums(target, sums, FIELD: tl.constexpr, num_features, num_rows, row_length):
    """Store the int32 sums of a field; ``target`` points to the program's first output."""
    offsets, is_there = field_places(FIELD, num_features, num_rows, row_length, sums.shape[0], sums.shape[1])
    tl.store(target + offsets, sums, mask=is_there)


@triton.jit
def store_scaled(target, sums, scale, FIELD: tl.constexpr, num_features, num_rows, row_length):
    """Rescale the sums of a field by float32 ``[TOKENS]`` and store them as float32."""
    offsets, is_there = field_places(FIELD, num_features, num_rows, row_length, sums.shape[0], sums.shape[1])
    tl.store(target + offsets, sums.to(tl.float32) * scale[None, :], mask=is_there)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_steps", "steps_per_split"])
def linear_kernel(
    x,
    activation_scale,
    row_sums,
    expert_offsets,
    tiles,
    weight_scale,
    output,
    partial,
    num_rows,
    num_experts,
    in_features,
    out_features,
    num_blocks,
    block_bytes,
    num_steps,
    steps_per_split,
    IS_BASE3: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Multiply a tile of rows by a group of row blocks; the module's text describes the arguments."""
    row_group, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if IS_GROUPED:
        expert, first_row, last_row = locate_tile(
            expert_offsets, num_experts, num_rows, tile, BLOCK_TOKENS, MAX_EXPERTS
        )
    else:
        expert, first_row, last_row = 0, tile * BLOCK_TOKENS, num_rows
    if first_row >= last_row:
        return
    first_block = row_group * ROW_BLOCKS
    first_step = split * steps_per_split
    tokens = tl.arange(0, BLOCK_TOKENS)
    is_row = tokens < last_row - first_row
    excess = tl.zeros([BLOCK_TOKENS], tl.int32)
    if not SUMS_ROWS and split == 0:  # the whole excess is taken off once
        excess = tl.load(row_sums + first_row + tokens, mask=is_row, other=0)
    block = tiles + (expert * num_blocks + first_block).to(tl.int64) * block_bytes
    sum0, sum1, sum2, sum3, _, _, _, _ = block_sums(
        x + first_row.to(tl.int64) * in_features,
        last_row - first_row,
        in_features,
        block,
        block,
        num_blocks - first_block,
        block_bytes,
        first_step,
        tl.minimum(first_step + steps_per_split, num_steps),
        excess,
        IS_BASE3,
        False,
        SUMS_ROWS,
        ROW_BLOCKS,
        BLOCK_TOKENS,
        USE_PTX,
    )
    place = first_row.to(tl.int64) * out_features + first_block * 64
    num_features, num_tokens = out_features - first_block * 64, last_row - first_row
    if IS_SPLIT:
        place += split.to(tl.int64) * num_rows * out_features
        store_sums(partial + place, sum0, 0, num_features, num_tokens, out_features)
        store_sums(partial + place, sum1, 1, num_features, num_tokens, out_features)
        store_sums(partial + place, sum2, 2, num_features, num_tokens, out_features)
        store_sums(partial + place, sum3, 3, num_features, num_tokens, out_features)
    else:
        scale = tl.load(activation_scale + first_row + tokens, mask=is_row, other=0.0) * tl.load(weight_scale + expert)
        store_scaled(output + place, sum0, scale, 0, num_features, num_tokens, out_features)
        store_scaled(output + place, sum1, scale, 1, num_features, num_tokens, out_features)
        store_scaled(output + place, sum2, scale, 2, num_features, num_tokens, out_features)
        store_scaled(output + place, sum3, scale, 3, num_features, num_tokens, out_features)


@triton.jit
def add_splits(partial, num_splits, num_rows, num_features, row, columns):
    """Add the shares of a row's sums: int32, at ``columns``, zero beyond ``num_features``."""
    total = tl.zeros(columns.shape, tl.int32)
    share_size = num_rows.to(tl.int64) * num_features
    for split in range(num_splits):
        source = partial + row * num_features + share_size * split
        total += tl.load(source + columns, mask=columns < num_features, other=0)
    return total


@triton.jit(do_not_specialize=["num_splits", "num_rows", "num_experts"])
def rescale_kernel(
    partial,
    activation_scale,
    weight_scale,
    expert_offsets,
    output,
    num_splits,
    num_rows,
    num_experts,
    out_features,
    IS_GROUPED: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Add the shares of ``partial`` and rescale them once; one program a row and ``BLOCK_FEATURES`` features."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    expert = expert_of_row(expert_offsets, num_experts, row, MAX_EXPERTS) if IS_GROUPED else 0
    total = add_splits(partial, num_splits, num_rows, out_features, row, columns)
    scale = tl.load(activation_scale + row) * tl.load(weight_scale + expert)
    tl.store(output + row * out_features + columns, total.to(tl.float32) * scale, mask=columns < out_features)
