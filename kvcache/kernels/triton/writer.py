"""Codes of a plane with the chosen scales, written as words: 32 lanes a program."""

import triton
import triton.language as tl

from kvcache.kernels.triton.levels import LANES, lane_starts
from kvcache.kernels.triton.viterbi import ROWS, find_costs, first_state, load_scaled, next_window, plain_levels


@triton.jit
def write_plain(y, scales, words, rows, is_row, NUM: tl.constexpr, Y_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr):
    """Write 8-bit rows; ``words`` are the lanes' first words of the segment."""
    for word in range(NUM // 4):
        bits = tl.zeros([ROWS], tl.int32)
        for index in tl.static_range(4):
            z = load_scaled(y, scales, word * 4 + index, rows, is_row, Y_STRIDE, SCALE_STRIDE)
            bits |= (plain_levels(z).to(tl.int32) & 255) << (8 * index)
        tl.store(words + word * LANES, bits, mask=is_row)


@triton.jit
def write_trellis(
    y,
    scales,
    words,
    survivors,
    level_table,
    rows,
    is_row,
    NUM: tl.constexpr,
    BITS: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
):
    """Write rows of trellis codes; ``words`` are the lanes' first words of the segment."""
    per_word: tl.constexpr = 32 // BITS
    costs = find_costs(y, scales, survivors, level_table, rows, is_row, NUM, BITS, Y_STRIDE, SCALE_STRIDE, True)
    state = first_state(costs)
    tl.debug_barrier()  # survivors are read by other threads than wrote them, if the compiler lays them out so
    for word in range(NUM // per_word):
        bits = tl.zeros([ROWS], tl.int32)
        for index in range(per_word):
            window = next_window(survivors, word * per_word + index, state, BITS)
            bits |= (window & ((1 << BITS) - 1)) << (index * BITS)
            state = window >> BITS
        tl.store(words + word * LANES, bits, mask=is_row)
    tl.debug_barrier()  # the next segment writes survivors anew


@triton.jit
def write_segment(
    y,
    scales,
    words,
    survivors,
    level_table,
    rows,
    is_row,
    SEGMENTS: tl.constexpr,
    INDEX: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
):
    """Write one segment; a ``layout.KeySegment`` also describes values, whose elements are tokens."""
    y += SEGMENTS[INDEX][3] * Y_STRIDE
    words += SEGMENTS[INDEX][4] * LANES
    if SEGMENTS[INDEX][1] == 8:
        write_plain(y, scales, words, rows, is_row, SEGMENTS[INDEX][0], Y_STRIDE, SCALE_STRIDE)
    else:
        write_trellis(
            y,
            scales,
            words,
            survivors,
            level_table,
            rows,
            is_row,
            SEGMENTS[INDEX][0],
            SEGMENTS[INDEX][1],
            Y_STRIDE,
            SCALE_STRIDE,
        )


@triton.jit
def write_kernel(
    y,
    chosen_scales,
    survivors,
    level_table,
    planes,
    plane_stride,
    NUM_ROWS: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    WORDS_PER_LANE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Write the codes of 32 lanes of a head.

    Grid: tiles of lanes x heads.

    Args:
        y: float32 ``[num_kv_heads, NUM_ELEMENTS, NUM_ROWS]``.
        chosen_scales: float32 ``[num_kv_heads, 64]``.
        survivors: uint8 ``[programs, NUM_ELEMENTS, 32, ROWS]``, scratch.
        level_table: see ``tables.py``.
        planes: int32 pointer to the codes of the first head's plane, written.
        plane_stride: words from one head to the next.
        NUM_ROWS: lanes: 64 tokens, or channels.
        NUM_ELEMENTS: elements of a lane: channels, or 64 tokens.
        WORDS_PER_LANE: words of a lane.
        SEGMENTS: see ``layout.py``.
        IS_KEY: a lane is a token and has one scale; else every element has its own.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    is_row = rows < NUM_ROWS
    words = planes + head * plane_stride + lane_starts(rows, WORDS_PER_LANE)
    own = survivors + (head * tl.num_programs(0) + tile) * (NUM_ELEMENTS * 32 * ROWS)
    for index in tl.static_range(len(SEGMENTS)):
        write_segment(
            y + head * (NUM_ELEMENTS * NUM_ROWS),
            chosen_scales + head * 64,
            words,
            own,
            level_table,
            rows,
            is_row,
            SEGMENTS,
            index,
            NUM_ROWS,
            0 if IS_KEY else 1,
        )
