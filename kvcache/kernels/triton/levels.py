"""Words of a page to int8 levels, each word read once a thread.

A lane's words lie 16 words apart. Element i of a word begins at bit ``i · BITS``; a trellis code looks up six bits from
there, which may reach into the next word of the segment. The shift by ``32 - i · BITS`` is made in two steps, because a
shift of a 32-bit number by 32 is not defined.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(16)
TABLE_OF_BITS = tl.constexpr((0, 128, 64, 0, 0))
"""Where the 64 levels of 1, 2 or 4 bits begin in the table of :mod:`kvcache.kernels.triton.tables`, by bits."""


@triton.jit
def lane_starts(lanes, WORDS_PER_LANE: tl.constexpr):
    """Return where the first word of each lane is, counted in words from the first code of the plane."""
    return lanes // LANES * (WORDS_PER_LANE * LANES) + lanes % LANES


@triton.jit
def load_levels(words, starts, is_lane, level_table, NUM_WORDS: tl.constexpr, NUM: tl.constexpr, BITS: tl.constexpr):
    """Look up the levels of one segment.

    Args:
        words: uint32 or int32 pointer to the plane's codes, moved on to the segment's first word.
        starts: int32 ``[lanes]``, see :func:`lane_starts`.
        is_lane: bool ``[lanes]``, lanes that there are.
        level_table: int8 ``[192]``.
        NUM_WORDS: words of the segment in a lane.
        NUM: elements to return; those beyond the segment are levels of any code.
        BITS: 8, 4, 2 or 1.
    Returns:
        int8 ``[lanes, NUM]``.
    """
    per_word: tl.constexpr = 32 // BITS
    index = tl.arange(0, NUM // per_word)
    places = starts[:, None] + index[None, :] * LANES
    mask = is_lane[:, None] & (index < NUM_WORDS)[None, :]
    shifts = (tl.arange(0, per_word) * BITS)[None, None, :]
    word = tl.load(words + places, mask=mask, other=0).to(tl.uint32, bitcast=True)[:, :, None]
    if BITS == 8:
        levels = (word >> shifts).to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        has_next = is_lane[:, None] & (index + 1 < NUM_WORDS)[None, :]
        following = tl.load(words + LANES + places, mask=has_next, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        windows = ((word >> shifts) | ((following << 1) << (31 - shifts))) & 63
        levels = tl.load(level_table + TABLE_OF_BITS[BITS] + windows)
    return tl.reshape(levels, [starts.shape[0], NUM])
