"""Partial results of all splits to outputs: packed ones leave the frame of the values, then all are merged."""

import triton
import triton.language as tl

from kvcache.kernels.triton.queries import CHANNELS_PER_STEP
from kvcache.kernels.triton.rounding import TINY, divide
from kvcache.kernels.triton.rows import query_rows
from kvcache.kernels.triton.softmax import LEAST


@triton.jit
def largest_maximum(maxima, rows, is_row, first_slot, last_slot, num_queries):
    """Return the largest maximum of slots, float32 ``[rows]``."""
    largest = tl.full(rows.shape, LEAST, tl.float32)
    for slot in range(first_slot, last_slot):
        partial = tl.load(maxima + slot * tl.cast(num_queries, tl.int64) + rows, mask=is_row, other=LEAST)
        largest = tl.maximum(largest, partial)
    return largest


@triton.jit
def add_slots(
    maxima,
    weight_sums,
    value_sums,
    rows,
    is_row,
    channels,
    maximum,
    first_slot,
    last_slot,
    num_queries,
    HEAD_DIM: tl.constexpr,
):
    """Add slots, relative to ``maximum``: the weights, float32 ``[rows]``, and the values, ``[rows, channels]``."""
    mask = is_row[:, None] & (channels < HEAD_DIM)[None, :]
    places = rows[:, None] * HEAD_DIM + channels[None, :]
    weight_sum = tl.zeros(rows.shape, tl.float32)
    value_sum = tl.zeros([rows.shape[0], channels.shape[0]], tl.float32)
    for slot in range(first_slot, last_slot):
        first_query = slot * tl.cast(num_queries, tl.int64)
        factor = tl.exp(tl.load(maxima + first_query + rows, mask=is_row, other=LEAST) - maximum)
        weight_sum += tl.load(weight_sums + first_query + rows, mask=is_row, other=0.0) * factor
        part = tl.load(value_sums + first_query * HEAD_DIM + places, mask=mask, other=0.0)
        value_sum += part * factor[:, None]
    return weight_sum, value_sum


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_packed_slots", "num_slots"])
def merge_kernel(
    maxima,
    weight_sums,
    value_sums,
    decode_matrix,
    mean,
    output,
    num_rows,
    num_queries,
    num_packed_slots,
    num_slots,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    IS_MAPPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Merge a tile of rows of one KV head.

    Args:
        maxima: float32 ``[num_slots, num_queries]``.
        weight_sums: float32 ``[num_slots, num_queries]``.
        value_sums: float32 ``[num_slots, num_queries, HEAD_DIM]``.
        decode_matrix: float32 ``[num_kv_heads, HEAD_DIM, HEAD_DIM]`` of the values.
        mean: float32 ``[num_kv_heads, HEAD_DIM]`` of the values.
        output: float32 ``[num_queries, HEAD_DIM]``, written.
        num_rows: rows of a KV head.
        num_queries: tokens times ``NUM_HEADS``.
        num_packed_slots: the first slots, which belong to packed pages.
        num_slots: all slots.
        NUM_HEADS: query heads.
        GROUP: query heads of a KV head.
        HEAD_DIM: channels.
        HEAD_DIM_PADDED: a power of two.
        IS_MAPPED: values of packed pages are in a frame.
        BLOCK_ROWS: rows of a tile.
    """
    head = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_ROWS
    tile_rows = first_row + tl.arange(0, BLOCK_ROWS)
    is_row = tile_rows < num_rows
    base, rows = query_rows(tile_rows, 0, first_row, head, NUM_HEADS, GROUP)
    maxima += base
    weight_sums += base
    value_sums += base * HEAD_DIM
    output += base * HEAD_DIM
    channels = tl.arange(0, HEAD_DIM_PADDED)
    is_channel = channels < HEAD_DIM
    maximum = largest_maximum(maxima, rows, is_row, 0, num_slots, num_queries)
    first_plain = 0
    total_weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, HEAD_DIM_PADDED], tl.float32)
    if IS_MAPPED:
        first_plain = num_packed_slots
        matrix = decode_matrix + head * (HEAD_DIM * HEAD_DIM)
        for start in range(0, HEAD_DIM, CHANNELS_PER_STEP):
            inner = start + tl.arange(0, CHANNELS_PER_STEP)
            total_weight, part = add_slots(
                maxima, weight_sums, value_sums, rows, is_row, inner, maximum, 0, num_packed_slots, num_queries,
                HEAD_DIM,
            )  # fmt: skip
            mask = (inner < HEAD_DIM)[:, None] & is_channel[None, :]
            part_matrix = tl.load(matrix + inner[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0.0)
            total = tl.dot(part, part_matrix, total, input_precision="tf32x3")
        centre = tl.load(mean + head * HEAD_DIM + channels, mask=is_channel, other=0.0)
        total += total_weight[:, None] * centre[None, :]
    plain_weight, plain = add_slots(
        maxima, weight_sums, value_sums, rows, is_row, channels, maximum, first_plain, num_slots, num_queries, HEAD_DIM
    )
    total_weight += plain_weight
    result = divide(total + plain, tl.maximum(total_weight, TINY)[:, None])
    tl.store(output + rows[:, None] * HEAD_DIM + channels[None, :], result, mask=is_row[:, None] & is_channel[None, :])
