"""Float16 planes to numbers in their frame, and the scales to try: sums in float64, rounded once.

A program takes 16 tokens of a head. The numbers are written so that the lanes of the trellis are neighbours: keys
``[channels][64 tokens]``, values ``[64 tokens][channels]``.
"""

import triton
import triton.language as tl

from kvcache.kernels.triton.rounding import ROUNDER64

TOKENS = tl.constexpr(16)
PAGE_SIZE = tl.constexpr(64)
LEVEL_UNIT = tl.constexpr(3.4 / 127)
"""``trellis.LEVEL_UNIT``."""


@triton.jit
def map_tokens(plane, encode_matrix, mean, tokens, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, IS_KEY: tl.constexpr):
    """Return ``(x - mean) @ encode_matrix`` of tokens, float32 ``[TOKENS, PADDED]``, zero beyond the last channel."""
    channels = tl.arange(0, PADDED)
    is_channel = channels < HEAD_DIM
    y = tl.zeros([TOKENS, PADDED], tl.float64)
    for channel in range(HEAD_DIM):
        places = channel * PAGE_SIZE + tokens if IS_KEY else tokens * HEAD_DIM + channel
        x = tl.load(plane + places).to(tl.float64) - tl.load(mean + channel).to(tl.float64)
        row = tl.load(encode_matrix + channel * HEAD_DIM + channels, mask=is_channel, other=0.0).to(tl.float64)
        y += x[:, None] * row[None, :]
    return y.to(tl.float32)


@triton.jit
def gaussian_codes(y, HEAD_DIM: tl.constexpr):
    """Return the scale codes of Gaussian vectors of the same lengths, int32 ``[TOKENS]``."""
    wide = y.to(tl.float64)
    root_mean_square = tl.sqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM)
    steps = (tl.log2(tl.maximum(root_mean_square * LEVEL_UNIT, 1e-30)) + 13) * 16
    rounded = (steps + ROUNDER64) - ROUNDER64
    return tl.minimum(tl.maximum(rounded, 0.0), 255.0).to(tl.int32)


@triton.jit
def covering_codes(y, covered_table):
    """Return the smallest codes whose largest number reaches the largest channel, int32 ``[TOKENS]``; 255 if none."""
    largest = tl.max(tl.abs(y), axis=1)
    covered = tl.load(covered_table + tl.arange(0, 256))
    num_smaller = tl.sum((covered[None, :] < largest[:, None]).to(tl.int32), axis=1)
    return tl.minimum(num_smaller, 255)


@triton.jit
def map_kernel(
    exact,
    encode_matrix,
    mean,
    scale_table,
    covered_table,
    scale_steps,
    y,
    trial_codes,
    trial_scales,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_TRIALS: tl.constexpr,
    IS_KEY: tl.constexpr,
    IS_PLAIN: tl.constexpr,
):
    """Map 16 tokens of one head.

    Args:
        exact: float16 pointer to the layer's planes.
        encode_matrix: float32 ``[num_kv_heads, HEAD_DIM, HEAD_DIM]``.
        mean: float32 ``[num_kv_heads, HEAD_DIM]``.
        scale_table: float32 ``[256]``.
        covered_table: float32 ``[256]``, see ``tables.py``.
        scale_steps: int32 ``[NUM_TRIALS]``, likewise.
        y: float32 ``[num_kv_heads, HEAD_DIM, 64]`` for keys, ``[num_kv_heads, 64, HEAD_DIM]`` for values; written.
        trial_codes: int32 ``[NUM_TRIALS, num_kv_heads, 64]``, written.
        trial_scales: float32, like ``trial_codes``; written.
        num_kv_heads: how many heads.
        HEAD_DIM: channels.
        PADDED: a power of two, at least that.
        NUM_TRIALS: scales to try; one for plain planes.
        IS_KEY: keys, else values.
        IS_PLAIN: the plane is of 8 bits throughout.
    """
    head = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    plane_size: tl.constexpr = HEAD_DIM * PAGE_SIZE
    plane = exact + head * (2 * plane_size) + (0 if IS_KEY else plane_size)
    matrix = encode_matrix + head * (HEAD_DIM * HEAD_DIM)
    mapped = map_tokens(plane, matrix, mean + head * HEAD_DIM, tokens, HEAD_DIM, PADDED, IS_KEY)
    channels = tl.arange(0, PADDED)
    if IS_KEY:
        places = channels[None, :] * PAGE_SIZE + tokens[:, None]
    else:
        places = tokens[:, None] * HEAD_DIM + channels[None, :]
    tl.store(y + head * plane_size + places, mapped, mask=(channels < HEAD_DIM)[None, :])
    codes = covering_codes(mapped, covered_table) if IS_PLAIN else gaussian_codes(mapped, HEAD_DIM)
    for trial in tl.static_range(NUM_TRIALS):
        code = codes
        if not IS_PLAIN:
            code = tl.minimum(tl.maximum(codes + tl.load(scale_steps + trial), 0), 255)
        place = (trial * num_kv_heads + head) * PAGE_SIZE + tokens
        tl.store(trial_codes + place, code)
        tl.store(trial_scales + place, tl.load(scale_table + code))
