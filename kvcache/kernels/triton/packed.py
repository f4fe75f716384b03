"""Attention to packed pages: codes are looked up in registers, products are of int8, no page is ever dequantized.

Scores: one product a segment of the keys, of levels ``[64 tokens, channels]`` and the query's digits. 8-bit segments
have two digits. Values: levels ``[channels, 64 tokens]`` and the weights of the page as integers up to 255, or 65535 in
two digits for 8-bit values. A digit of 0 … 255 enters as int8 less 128, and 128 times the sum of the levels is added
again. All sums are exact in int32, so integers are those of the reference:
    scores      D · 127 · 16256 for two digits, below 2^29 at D = 256
    values      64 · 127 · 65535, below 2^29

Grid: tiles of rows x KV heads x splits of a sequence's pages.
"""

import triton
import triton.language as tl

from kvcache.kernels.triton.exact import half_scores, half_values, load_key_plane, load_query, load_value_plane
from kvcache.kernels.triton.levels import lane_starts, load_levels
from kvcache.kernels.triton.rounding import TINY, round_to_even
from kvcache.kernels.triton.rows import locate_tile, query_rows, split_pages
from kvcache.kernels.triton.softmax import LEAST, PAGE_SIZE, add_page, page_weights, store_partial


@triton.jit
def load_digits(digits, rows, is_row, FIRST: tl.constexpr, NUM: tl.constexpr, NUM_DIGITS: tl.constexpr):
    """Load int8 ``[NUM, rows]`` digits of queries from column ``FIRST``; ``digits`` points to row 0's."""
    columns = FIRST + tl.arange(0, NUM)
    places = rows[None, :] * NUM_DIGITS + columns[:, None]
    return tl.load(digits + places, mask=is_row[None, :], other=0)


@triton.jit
def load_segments(digits, rows, is_row, KEY_SEGMENTS: tl.constexpr, NUM_DIGITS: tl.constexpr):
    """Load the digits that the scores of all pages take, as a tuple of ``(high, low)`` by segment.

    Segments of less than 8 bits have one digit, which stands for both.
    """
    parts = ()
    # Triton unrolls the loop, so the tuple has another type after each turn, which mypy does not follow
    for index in tl.static_range(len(KEY_SEGMENTS)):
        parts += (load_segment(digits, rows, is_row, KEY_SEGMENTS, index, NUM_DIGITS),)  # type: ignore[assignment]
    return parts


@triton.jit
def load_segment(digits, rows, is_row, SEGMENTS: tl.constexpr, INDEX: tl.constexpr, NUM_DIGITS: tl.constexpr):
    """Load the digits of one segment, int8 ``[padded channels, rows]`` twice."""
    high = load_digits(digits, rows, is_row, SEGMENTS[INDEX][5], SEGMENTS[INDEX][2], NUM_DIGITS)
    low = high
    if SEGMENTS[INDEX][1] == 8:
        low = load_digits(digits, rows, is_row, SEGMENTS[INDEX][5] + SEGMENTS[INDEX][2], SEGMENTS[INDEX][2], NUM_DIGITS)
    return high, low


@triton.jit
def segment_scores(words, starts, high, low, unit, level_table, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    """Return a segment's part of the scores, float32 ``[64, rows]``, before the scale of the token.

    Args:
        words: int32 pointer to the key codes of the page.
        starts: int32 ``[64]``, first word of every token.
        high: int8 ``[padded channels, rows]``, the queries' digits.
        low: the same, second digits of 8-bit segments.
        unit: float32 ``[rows]``.
        level_table: see ``tables.py``.
        SEGMENTS: see ``layout.py``; taken whole, because Triton 3.7 passes no part of a constant tuple on.
        INDEX: which of them.
    """
    num_words: tl.constexpr = SEGMENTS[INDEX][0] * SEGMENTS[INDEX][1] // 32
    levels = load_levels(
        words + SEGMENTS[INDEX][4] * 16,
        starts,
        starts >= 0,
        level_table,
        num_words,
        SEGMENTS[INDEX][2],
        SEGMENTS[INDEX][1],
    )
    sums = tl.dot(levels, high, out_dtype=tl.int32)
    if SEGMENTS[INDEX][1] == 8:
        sums = tl.dot(levels, low, sums * 128, out_dtype=tl.int32)
    return sums.to(tl.float32) * unit[None, :]


@triton.jit
def sum_levels(levels, integers):
    """Return the sum of levels int8 ``[channels, 64]`` by integers 0 … 255, float32 ``[64, rows]``; int32."""
    shifted = (integers - 128.0).to(tl.int8)
    excess = tl.sum(levels.to(tl.int32), axis=1) * 128
    return tl.dot(levels, shifted, out_dtype=tl.int32) + excess[:, None]


@triton.jit
def packed_values(
    words,
    scale,
    weights,
    level_table,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    """Return the weighted sum of a page's values in their frame, float32 ``[channels, rows]``.

    Args:
        words: int32 pointer to the value codes of the page.
        scale: float32 ``[64]``, of every token.
        weights: float32 ``[64, rows]``.
        level_table: see ``tables.py``.
        BITS: 8, 4 or 2.
        HEAD_DIM: channels that there are.
        HEAD_DIM_PADDED: channels to return.
    """
    channels = tl.arange(0, HEAD_DIM_PADDED)
    starts = lane_starts(channels, 2 * BITS)
    levels = load_levels(words, starts, channels < HEAD_DIM, level_table, 2 * BITS, 64, BITS)
    scaled = weights * scale[:, None]
    unit = tl.max(scaled, axis=0) * (1.0 / (65535 if BITS == 8 else 255))
    integers = round_to_even(scaled * (1.0 / tl.maximum(unit, TINY))[None, :])
    if BITS == 8:
        high = tl.floor(integers * (1.0 / 256))
        sums = sum_levels(levels, high) * 256 + sum_levels(levels, integers - high * 256)
    else:
        sums = sum_levels(levels, integers)
    return sums.to(tl.float32) * unit[None, :]


@triton.jit(do_not_specialize=["num_sequences", "num_queries", "num_splits", "packed_page_lines", "packed_layer_line"])
def packed_kernel(
    query_high,
    query_low,
    query_unit,
    digits,
    digit_units,
    query_offset,
    packed_bytes,
    packed_words,
    packed_halves,
    level_table,
    scale_table,
    row_offsets,
    page_offsets,
    page_ids,
    page_is_packed,
    page_num_tokens,
    maxima,
    weight_sums,
    value_sums,
    num_sequences,
    num_queries,
    num_splits,
    packed_page_lines,
    packed_layer_line,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    KEY_SEGMENTS: tl.constexpr,
    NUM_DIGITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_CODE_BYTES: tl.constexpr,
    KEY_PLANE_BYTES: tl.constexpr,
    VALUE_CODE_BYTES: tl.constexpr,
    HEAD_LINES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MAX_SEQUENCES: tl.constexpr,
):
    """Attend from a tile of rows to a share of the packed pages of its sequence.

    Args:
        query_high: float16 ``[num_queries, HEAD_DIM]``, for keys of 16 bits, as are the next two.
        query_low: like ``query_high``.
        query_unit: float32 ``[num_queries]``.
        digits: int8 ``[num_queries, NUM_DIGITS]``, for other keys, as are the next two.
        digit_units: float32 ``[num_queries, segments]``.
        query_offset: float32 ``[num_queries]``, query · mean of the keys.
        packed_bytes: uint8 pointer to the memory of pages.
        packed_words: the same as int32.
        packed_halves: the same as float16.
        level_table: int8, see ``tables.py``.
        scale_table: float32 ``[256]``.
        row_offsets: int64 ``[num_sequences + 1]``.
        page_offsets: int64 ``[num_sequences + 1]``.
        page_ids: int32 ``[num_pages]``.
        page_is_packed: uint8 ``[num_pages]``.
        page_num_tokens: int32 ``[num_pages]``.
        maxima: float32 ``[slots, num_queries]``, written, as are the next two.
        weight_sums: float32 ``[slots, num_queries]``.
        value_sums: float32 ``[slots, num_queries, HEAD_DIM]``, in the frame of the values.
        num_sequences: how many sequences.
        num_queries: tokens times ``NUM_HEADS``.
        num_splits: shares of the pages.
        packed_page_lines: 64-byte lines of a page.
        packed_layer_line: where the layer begins in a page, lines.
        NUM_HEADS: query heads.
        GROUP: query heads of a KV head.
        HEAD_DIM: channels; this and the next constants are those of ``layout.page_constants``.
        HEAD_DIM_PADDED: a power of two.
        KEY_SEGMENTS: how keys are cut; empty at 16 bits.
        NUM_DIGITS: columns of ``digits``.
        VALUE_BITS: 16, 8, 4 or 2.
        KEY_CODE_BYTES: bytes of a head's key codes.
        KEY_PLANE_BYTES: those with their scales.
        VALUE_CODE_BYTES: bytes of a head's value codes.
        HEAD_LINES: 64-byte lines of a head.
        BLOCK_ROWS: rows of a tile.
        MAX_SEQUENCES: a power of two, at least ``num_sequences``.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first_token, first_row, num_rows = locate_tile(
        row_offsets, num_sequences, tile, GROUP, BLOCK_ROWS, MAX_SEQUENCES
    )
    if first_row >= num_rows:
        return
    tile_rows = first_row + tl.arange(0, BLOCK_ROWS)
    is_row = tile_rows < num_rows
    base, rows = query_rows(tile_rows, first_token, first_row, head, NUM_HEADS, GROUP)
    num_segments: tl.constexpr = len(KEY_SEGMENTS)
    if num_segments == 0:
        high, low, unit = load_query(query_high, query_low, query_unit, base, rows, is_row, HEAD_DIM, HEAD_DIM_PADDED)
    else:
        parts = load_segments(digits + base * NUM_DIGITS, rows, is_row, KEY_SEGMENTS, NUM_DIGITS)
    tokens = tl.arange(0, PAGE_SIZE)
    maximum = tl.full([BLOCK_ROWS], LEAST, tl.float32)
    weight_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    value_sum = tl.zeros([HEAD_DIM_PADDED, BLOCK_ROWS], tl.float32)
    first, stop = split_pages(page_offsets, sequence, split, num_splits)
    for page in range(first, stop):
        if tl.load(page_is_packed + page) != 0:
            line = tl.load(page_ids + page).to(tl.int64) * packed_page_lines + packed_layer_line + head * HEAD_LINES
            if num_segments == 0:
                keys = load_key_plane(packed_halves + line * 32, HEAD_DIM, HEAD_DIM_PADDED)
                scores = half_scores(keys, high, low, unit)
            else:
                starts = lane_starts(tokens, KEY_CODE_BYTES // 256)
                scores = tl.zeros([PAGE_SIZE, BLOCK_ROWS], tl.float32)
                for index in tl.static_range(num_segments):
                    high_digits, low_digits = parts[index]
                    # units and offsets are read again for every page: they would take many registers of each thread
                    unit = tl.load(digit_units + (base + rows) * num_segments + index, mask=is_row, other=0.0)
                    scores += segment_scores(
                        packed_words + line * 16,
                        starts,
                        high_digits,
                        low_digits,
                        unit,
                        level_table,
                        KEY_SEGMENTS,
                        index,
                    )
                codes = tl.load(packed_bytes + line * 64 + KEY_CODE_BYTES + tokens)
                offset = tl.load(query_offset + base + rows, mask=is_row, other=0.0)
                scores = scores * tl.load(scale_table + codes)[:, None] + offset[None, :]
            is_seen = (tokens < tl.load(page_num_tokens + page))[:, None]
            largest, weights = page_weights(scores, is_seen)
            if VALUE_BITS == 16:
                plane = packed_halves + line * 32 + KEY_PLANE_BYTES // 2
                values = half_values(load_value_plane(plane, HEAD_DIM, HEAD_DIM_PADDED), weights)
            else:
                codes = tl.load(packed_bytes + line * 64 + KEY_PLANE_BYTES + VALUE_CODE_BYTES + tokens)
                values = packed_values(
                    packed_words + line * 16 + KEY_PLANE_BYTES // 4,
                    tl.load(scale_table + codes),
                    weights,
                    level_table,
                    VALUE_BITS,
                    HEAD_DIM,
                    HEAD_DIM_PADDED,
                )
            maximum, weight_sum, value_sum = add_page(maximum, weight_sum, value_sum, largest, weights, values)
    first_query = split * tl.cast(num_queries, tl.int64) + base
    store_partial(maxima, weight_sums, value_sums, maximum, weight_sum, value_sum, rows, is_row, first_query, HEAD_DIM)
