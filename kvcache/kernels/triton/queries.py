"""Queries, scaled, in the forms that the attention kernels multiply; one program a tile of rows of a KV head.

Float16 pages take ``query = (high + low / LOW_PART) · unit``. Packed keys take ``query' = query @ decode_matrix.T``,
which is in the frame of the keys, as int8 digits with one unit a segment, and ``query · mean``.

Products of float32 run on tensor cores in three parts (``tf32x3``), which is about as exact as float32.
"""

import triton
import triton.language as tl

from kvcache.kernels.triton.rounding import TINY, divide, split_half, to_integers
from kvcache.kernels.triton.rows import query_rows

CHANNELS_PER_STEP = tl.constexpr(32)


@triton.jit
def map_segment(
    query,
    scale,
    decode_matrix,
    rows,
    is_row,
    SEGMENTS: tl.constexpr,
    INDEX: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Map queries to the channels of one segment; float32 ``[rows, padded channels]``, zero beyond the segment."""
    num_columns: tl.constexpr = SEGMENTS[INDEX][2]
    columns = tl.arange(0, num_columns)
    mapped = tl.zeros([BLOCK_ROWS, num_columns], tl.float32)
    for start in range(0, HEAD_DIM, CHANNELS_PER_STEP):
        channels = start + tl.arange(0, CHANNELS_PER_STEP)
        is_channel = channels < HEAD_DIM
        mask = is_row[:, None] & is_channel[None, :]
        part = tl.load(query + rows[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0.0) * scale
        mask = is_channel[:, None] & (columns < SEGMENTS[INDEX][0])[None, :]
        places = (SEGMENTS[INDEX][3] + columns)[None, :] * HEAD_DIM + channels[:, None]
        matrix = tl.load(decode_matrix + places, mask=mask, other=0.0)
        mapped = tl.dot(part, matrix, mapped, input_precision="tf32x3")
    return mapped


@triton.jit
def write_digits(digits, mapped, rows, is_row, SEGMENTS: tl.constexpr, INDEX: tl.constexpr, NUM_DIGITS: tl.constexpr):
    """Write the digits of a segment; returns their unit, float32 ``[rows]``."""
    largest = tl.max(tl.abs(mapped), axis=1)
    places = rows[:, None] * NUM_DIGITS + (SEGMENTS[INDEX][5] + tl.arange(0, SEGMENTS[INDEX][2]))[None, :]
    mask = is_row[:, None]
    if SEGMENTS[INDEX][1] == 8:
        unit = divide(largest, tl.full(largest.shape, 16256.0, tl.float32))
        integers = to_integers(mapped, unit[:, None])
        high = tl.floor(integers * (1.0 / 128) + 0.5)
        tl.store(digits + places, high.to(tl.int8), mask=mask)
        tl.store(digits + places + SEGMENTS[INDEX][2], (integers - high * 128).to(tl.int8), mask=mask)
    else:
        unit = divide(largest, tl.full(largest.shape, 127.0, tl.float32))
        tl.store(digits + places, to_integers(mapped, unit[:, None]).to(tl.int8), mask=mask)
    return unit


@triton.jit(do_not_specialize=["num_rows"])
def query_kernel(
    query,
    decode_matrix,
    mean,
    query_high,
    query_low,
    query_unit,
    digits,
    digit_units,
    query_offset,
    scale,
    num_rows,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    KEY_SEGMENTS: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Prepare a tile of rows of one KV head.

    Args:
        query: float32 ``[num_queries, HEAD_DIM]``.
        decode_matrix: float32 ``[num_kv_heads, HEAD_DIM, HEAD_DIM]`` of the keys.
        mean: float32 ``[num_kv_heads, HEAD_DIM]`` of the keys.
        query_high: float16 ``[num_queries, HEAD_DIM]``, written.
        query_low: like ``query_high``.
        query_unit: float32 ``[num_queries]``, written.
        digits: int8 ``[num_queries, NUM_DIGITS]``, written.
        digit_units: float32 ``[num_queries, segments]``, written.
        query_offset: float32 ``[num_queries]``, written.
        scale: float32, what scores are multiplied with.
        num_rows: rows of a KV head.
        NUM_HEADS: query heads.
        GROUP: query heads of a KV head.
        HEAD_DIM: channels.
        HEAD_DIM_PADDED: a power of two.
        KEY_SEGMENTS: how packed keys are cut; empty at 16 bits, where nothing is mapped.
        NUM_DIGITS: columns of ``digits``.
        BLOCK_ROWS: rows of a tile.
    """
    head = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_ROWS
    tile_rows = first_row + tl.arange(0, BLOCK_ROWS)
    is_row = tile_rows < num_rows
    base, rows = query_rows(tile_rows, 0, first_row, head, NUM_HEADS, GROUP)
    query += base * HEAD_DIM
    query_high += base * HEAD_DIM
    query_low += base * HEAD_DIM
    digits += base * NUM_DIGITS
    channels = tl.arange(0, HEAD_DIM_PADDED)
    is_channel = channels < HEAD_DIM
    mask = is_row[:, None] & is_channel[None, :]
    places = rows[:, None] * HEAD_DIM + channels[None, :]
    scaled = tl.load(query + places, mask=mask, other=0.0) * scale
    unit = tl.max(tl.abs(scaled), axis=1)
    high, low = split_half(divide(scaled, tl.maximum(unit, TINY)[:, None]))
    tl.store(query_high + places, high, mask=mask)
    tl.store(query_low + places, low, mask=mask)
    tl.store(query_unit + base + rows, unit, mask=is_row)
    num_segments: tl.constexpr = len(KEY_SEGMENTS)
    if num_segments > 0:
        centre = tl.load(mean + head * HEAD_DIM + channels, mask=is_channel, other=0.0)
        tl.store(query_offset + base + rows, tl.sum(scaled * centre[None, :], axis=1), mask=is_row)
        matrix = decode_matrix + head * (HEAD_DIM * HEAD_DIM)
        for index in tl.static_range(num_segments):
            mapped = map_segment(query, scale, matrix, rows, is_row, KEY_SEGMENTS, index, HEAD_DIM, BLOCK_ROWS)
            units = write_digits(digits, mapped, rows, is_row, KEY_SEGMENTS, index, NUM_DIGITS)
            tl.store(digit_units + base * num_segments + index + rows * num_segments, units, mask=is_row)
