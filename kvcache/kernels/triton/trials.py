"""Which scale every token takes: each trial is coded by programs of its own, then the errors are compared."""

import triton
import triton.language as tl

from kvcache.kernels.triton.levels import TABLE_OF_BITS
from kvcache.kernels.triton.viterbi import ROWS, find_costs, first_state, load_scaled, next_window, plain_error

PAGE_SIZE = tl.constexpr(64)


@triton.jit
def segment_error(y, scales, level_table, rows, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    """Return the squared error of one segment of 32 keys in units of levels, float32 ``[ROWS]``."""
    start = y + SEGMENTS[INDEX][3] * PAGE_SIZE
    is_row = rows >= 0
    if SEGMENTS[INDEX][1] == 8:
        return plain_error(start, scales, rows, is_row, SEGMENTS[INDEX][0], PAGE_SIZE, 0)
    else:  # Triton compiles one of the branches, and types what follows a return otherwise
        costs = find_costs(
            start,
            scales,
            level_table,
            level_table,
            rows,
            is_row,
            SEGMENTS[INDEX][0],
            SEGMENTS[INDEX][1],
            PAGE_SIZE,
            0,
            False,
        )
        return tl.min(costs, axis=0)


@triton.jit
def key_trial_kernel(
    y,
    trial_scales,
    segment_weights,
    level_table,
    errors,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    KEY_SEGMENTS: tl.constexpr,
):
    """Code 32 keys of a head with the scales of one trial.

    Grid: 2 x heads x trials.

    Args:
        y: float32 ``[num_kv_heads, HEAD_DIM, 64]``.
        trial_scales: float32 ``[trials, num_kv_heads, 64]``.
        segment_weights: float32 ``[num_kv_heads, segments]``.
        level_table: see ``tables.py``.
        errors: float32 ``[trials, num_kv_heads, 64]``, written, in units of squared levels.
        num_kv_heads: how many heads.
        HEAD_DIM: channels.
        KEY_SEGMENTS: see ``layout.py``.
    """
    head, trial = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = (trial * num_kv_heads + head) * PAGE_SIZE
    source = y + head * (HEAD_DIM * PAGE_SIZE)
    error = tl.zeros([ROWS], tl.float32)
    for index in tl.static_range(len(KEY_SEGMENTS)):
        weight = tl.load(segment_weights + head * len(KEY_SEGMENTS) + index)
        error = error + weight * segment_error(source, trial_scales + place, level_table, rows, KEY_SEGMENTS, index)
    tl.store(errors + place + rows, error)


@triton.jit
def value_trial_kernel(
    y, trial_scales, level_table, survivors, errors, num_kv_heads, HEAD_DIM: tl.constexpr, BITS: tl.constexpr
):
    """Code 32 channels of a head's values with the scales of one trial.

    Grid: tiles of channels x heads x trials.

    Args:
        y: float32 ``[num_kv_heads, 64, HEAD_DIM]``.
        trial_scales: float32 ``[trials, num_kv_heads, 64]``.
        level_table: see ``tables.py``.
        survivors: uint8 ``[programs, 64, states, ROWS]``, scratch.
        errors: float32 ``[trials, num_kv_heads, HEAD_DIM, 64]``, written, in units of squared levels.
        num_kv_heads: how many heads.
        HEAD_DIM: channels.
        BITS: 4 or 2.
    """
    tile, head, trial = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    is_row = rows < HEAD_DIM
    states: tl.constexpr = 64 >> BITS
    own = survivors + ((trial * num_kv_heads + head) * tl.num_programs(0) + tile) * (PAGE_SIZE * states * ROWS)
    place = trial * num_kv_heads + head
    source, scales = y + head * (HEAD_DIM * PAGE_SIZE), trial_scales + place * PAGE_SIZE
    costs = find_costs(source, scales, own, level_table, rows, is_row, PAGE_SIZE, BITS, HEAD_DIM, 1, True)
    state = first_state(costs)
    tl.debug_barrier()  # survivors are read by other threads than wrote them, if the compiler lays them out so
    for token in range(PAGE_SIZE):
        window = next_window(own, token, state, BITS)
        level = tl.load(level_table + TABLE_OF_BITS[BITS] + window).to(tl.float32)
        distance = load_scaled(source, scales, token, rows, is_row, HEAD_DIM, 1) - level
        tl.store(errors + (place * HEAD_DIM + rows) * PAGE_SIZE + token, distance * distance, mask=is_row)
        state = window >> BITS


@triton.jit
def choose_kernel(
    errors,
    trial_codes,
    trial_scales,
    planes,
    chosen_scales,
    num_kv_heads,
    plane_stride,
    NUM_TRIALS: tl.constexpr,
    NUM_ERRORS: tl.constexpr,
):
    """Give every token of a head its first best trial; one program a head.

    Args:
        errors: float32 ``[NUM_TRIALS, num_kv_heads, NUM_ERRORS, 64]``.
        trial_codes: int32 ``[NUM_TRIALS, num_kv_heads, 64]``.
        trial_scales: float32, like ``trial_codes``.
        planes: uint8 pointer to the scale codes of the first head's plane, written.
        chosen_scales: float32 ``[num_kv_heads, 64]``, written.
        num_kv_heads: how many heads.
        plane_stride: bytes from one head to the next.
        NUM_TRIALS: how many trials.
        NUM_ERRORS: errors of a token, added in ascending order.
    """
    head = tl.program_id(0)
    tokens = tl.arange(0, PAGE_SIZE)
    best = tl.load(trial_codes + head * PAGE_SIZE + tokens)
    best_scale = tl.load(trial_scales + head * PAGE_SIZE + tokens)
    best_error = tl.full([PAGE_SIZE], float("inf"), tl.float32)
    if NUM_TRIALS > 1:
        for trial in range(NUM_TRIALS):
            place = trial * num_kv_heads + head
            error = tl.zeros([PAGE_SIZE], tl.float32)
            for index in range(NUM_ERRORS):
                error = error + tl.load(errors + (place * NUM_ERRORS + index) * PAGE_SIZE + tokens)
            scale = tl.load(trial_scales + place * PAGE_SIZE + tokens)
            error = error * (scale * scale)
            is_better = error < best_error
            best = tl.where(is_better, tl.load(trial_codes + place * PAGE_SIZE + tokens), best)
            best_scale = tl.where(is_better, scale, best_scale)
            best_error = tl.where(is_better, error, best_error)
    tl.store(planes + head * plane_stride + tokens, best.to(tl.uint8))
    tl.store(chosen_scales + head * PAGE_SIZE + tokens, best_scale)
