"""Attention to float16 pages and to the new tokens themselves.

Keys and values are float16; queries and weights are float32 in two float16 parts, so two products on tensor cores give
the accuracy of float32. New tokens are rounded to float16 on the way in, as they will be in their page.

Grid: tiles of rows x KV heads x (splits + 1). The last split takes the new tokens, the others share the pages.
"""

import triton
import triton.language as tl

from kvcache.kernels.triton.rounding import dot_split, split_half
from kvcache.kernels.triton.rows import locate_tile, query_rows, split_pages
from kvcache.kernels.triton.softmax import LEAST, PAGE_SIZE, add_page, page_weights, store_partial

FLAGS = tl.constexpr(64)
"""Pages whose kind is looked at together: most pages of a long sequence are packed."""


@triton.jit
def load_query(
    query_high, query_low, query_unit, base, rows, is_row, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr
):
    """Load the two parts of queries, float16 ``[channels, rows]``, and their units, float32 ``[rows]``."""
    query_high += base * HEAD_DIM
    query_low += base * HEAD_DIM
    channels = tl.arange(0, HEAD_DIM_PADDED)
    places = rows[None, :] * HEAD_DIM + channels[:, None]
    mask = (channels < HEAD_DIM)[:, None] & is_row[None, :]
    high = tl.load(query_high + places, mask=mask, other=0.0)
    low = tl.load(query_low + places, mask=mask, other=0.0)
    return high, low, tl.load(query_unit + base + rows, mask=is_row, other=0.0)


@triton.jit
def load_key_plane(plane, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr):
    """Load the keys of a float16 plane ``[HEAD_DIM][64]`` as ``[64, channels]``; zero beyond the last channel."""
    tokens, channels = tl.arange(0, PAGE_SIZE), tl.arange(0, HEAD_DIM_PADDED)
    places = channels[None, :] * PAGE_SIZE + tokens[:, None]
    return tl.load(plane + places, mask=(channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_value_plane(plane, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr):
    """Load the values of a float16 plane ``[64][HEAD_DIM]`` as ``[channels, 64]``; zero beyond the last channel."""
    tokens, channels = tl.arange(0, PAGE_SIZE), tl.arange(0, HEAD_DIM_PADDED)
    places = tokens[None, :] * HEAD_DIM + channels[:, None]
    return tl.load(plane + places, mask=(channels < HEAD_DIM)[:, None], other=0.0)


@triton.jit
def half_scores(key, high, low, unit):
    """Return scores, float32 ``[64, rows]``, of float16 keys ``[64, channels]``."""
    return dot_split(key, high, low) * unit[None, :]


@triton.jit
def half_values(value, weights):
    """Return the sum of float16 values ``[channels, 64]`` by weights ``[64, rows]`` up to 1; float32."""
    high, low = split_half(weights)
    return dot_split(value, high, low)


@triton.jit
def load_new(source, token, num_tokens, row_length, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr):
    """Load 64 new tokens of a head as float16 ``[64, channels]``; zero where there are none.

    Args:
        source: float32 pointer to the head's channels of the sequence's first new token.
        token: first token to load.
        num_tokens: new tokens of the sequence.
        row_length: floats from one token to the next.
        HEAD_DIM: channels that there are.
        HEAD_DIM_PADDED: channels to return.
    """
    tokens, channels = token + tl.arange(0, PAGE_SIZE), tl.arange(0, HEAD_DIM_PADDED)
    mask = (tokens < num_tokens)[:, None] & (channels < HEAD_DIM)[None, :]
    places = tokens.to(tl.int64)[:, None] * row_length + channels[None, :]
    return tl.load(source + places, mask=mask, other=0.0).to(tl.float16)


@triton.jit(
    do_not_specialize=[
        "num_sequences",
        "num_queries",
        "num_splits",
        "exact_page_lines",
        "exact_layer_line",
        "first_slot",
    ]
)
def exact_kernel(
    query_high,
    query_low,
    query_unit,
    key,
    value,
    exact,
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
    exact_page_lines,
    exact_layer_line,
    first_slot,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MAX_SEQUENCES: tl.constexpr,
):
    """Attend from a tile of rows to a share of the float16 pages of its sequence, or to its new tokens.

    Args:
        query_high: float16 ``[num_queries, HEAD_DIM]``, from ``queries.py``, as are the next two.
        query_low: like ``query_high``.
        query_unit: float32 ``[num_queries]``.
        key: float32 ``[num_tokens, num_kv_heads, HEAD_DIM]``, the new tokens.
        value: like ``key``.
        exact: float16 pointer to the memory of pages.
        row_offsets: int64 ``[num_sequences + 1]``.
        page_offsets: int64 ``[num_sequences + 1]``.
        page_ids: int32 ``[num_pages]``.
        page_is_packed: uint8 ``[num_pages]``.
        page_num_tokens: int32 ``[num_pages]``.
        maxima: float32 ``[slots, num_queries]``, written, as are the next two.
        weight_sums: float32 ``[slots, num_queries]``.
        value_sums: float32 ``[slots, num_queries, HEAD_DIM]``.
        num_sequences: how many sequences.
        num_queries: tokens times ``NUM_HEADS``.
        num_splits: shares of the pages.
        exact_page_lines: 64-byte lines of a page.
        exact_layer_line: where the layer begins in a page, lines.
        first_slot: slot of the first share.
        NUM_HEADS: query heads.
        GROUP: query heads of a KV head.
        HEAD_DIM: channels.
        HEAD_DIM_PADDED: a power of two, at least 32.
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
    high, low, unit = load_query(query_high, query_low, query_unit, base, rows, is_row, HEAD_DIM, HEAD_DIM_PADDED)
    tokens = tl.arange(0, PAGE_SIZE)
    maximum = tl.full([BLOCK_ROWS], LEAST, tl.float32)
    weight_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    value_sum = tl.zeros([HEAD_DIM_PADDED, BLOCK_ROWS], tl.float32)
    plane_size: tl.constexpr = HEAD_DIM * PAGE_SIZE
    if split < num_splits:
        first, stop = split_pages(page_offsets, sequence, split, num_splits)
        for block in range(first, stop, FLAGS):
            pages = block + tl.arange(0, FLAGS)
            is_packed = tl.load(page_is_packed + pages, mask=pages < stop, other=1)
            if tl.min(is_packed.to(tl.int32), axis=0) == 0:
                for page in range(block, tl.minimum(block + FLAGS, stop)):
                    if tl.load(page_is_packed + page) == 0:
                        line = tl.load(page_ids + page).to(tl.int64) * exact_page_lines + exact_layer_line
                        plane = exact + line * 32 + head * (2 * plane_size)
                        is_seen = (tokens < tl.load(page_num_tokens + page))[:, None] & is_row[None, :]
                        scores = half_scores(load_key_plane(plane, HEAD_DIM, HEAD_DIM_PADDED), high, low, unit)
                        largest, weights = page_weights(scores, is_seen)
                        values = load_value_plane(plane + plane_size, HEAD_DIM, HEAD_DIM_PADDED)
                        values = half_values(values, weights)
                        maximum, weight_sum, value_sum = add_page(
                            maximum, weight_sum, value_sum, largest, weights, values
                        )
    else:
        num_new = num_rows // GROUP
        row_length: tl.constexpr = (NUM_HEADS // GROUP) * HEAD_DIM
        source = first_token.to(tl.int64) * row_length + head * HEAD_DIM
        last_seen = tile_rows // GROUP
        num_seen = tl.minimum(first_row + BLOCK_ROWS - 1, num_rows - 1) // GROUP + 1
        for token in range(0, num_seen, PAGE_SIZE):
            is_seen = ((token + tokens)[:, None] <= last_seen[None, :]) & is_row[None, :]
            keys = load_new(key + source, token, num_new, row_length, HEAD_DIM, HEAD_DIM_PADDED)
            largest, weights = page_weights(half_scores(keys, high, low, unit), is_seen)
            values = load_new(value + source, token, num_new, row_length, HEAD_DIM, HEAD_DIM_PADDED)
            values = half_values(tl.trans(values), weights)
            maximum, weight_sum, value_sum = add_page(maximum, weight_sum, value_sum, largest, weights, values)
    first_query = (first_slot + split) * tl.cast(num_queries, tl.int64) + base
    store_partial(maxima, weight_sums, value_sums, maximum, weight_sum, value_sum, rows, is_row, first_query, HEAD_DIM)
