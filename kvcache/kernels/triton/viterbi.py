"""The best row of trellis codes, for 32 rows at a time: a thread holds all states of its row.

Rows are the last axis, so that the states of a row lie in the registers of one thread and nothing is exchanged. Going
from the last element to the first, the cost of a new state is the least over the windows that lead to it; which one is
kept as a byte in global memory. Then the codes are read off from the first element on. All arithmetic is that of
:mod:`kvcache.trellis`, operation by operation, without fused multiply-adds.

Rows and their scales are read through strides: for keys an element is a channel and a row a token, for values an
element is a token and a row a channel.
"""

import triton
import triton.language as tl

from kvcache.kernels.triton.levels import TABLE_OF_BITS
from kvcache.kernels.triton.rounding import ROUNDER, divide

ROWS = tl.constexpr(32)
FAR = tl.constexpr(1e30)


@triton.jit
def load_scaled(y, scales, element, rows, is_row, Y_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr):
    """Return an element of all rows in units of levels, float32 ``[ROWS]``.

    Args:
        y: float32 pointer; rows are neighbours, elements ``Y_STRIDE`` apart.
        scales: float32 pointer; one an element, ``SCALE_STRIDE`` apart, or one a row if that is 0.
        element: which element.
        rows: int32 ``[ROWS]``.
        is_row: bool ``[ROWS]``.
        Y_STRIDE: see ``y``.
        SCALE_STRIDE: see ``scales``.
    """
    x = tl.load(y + element * Y_STRIDE + rows, mask=is_row, other=0.0)
    if SCALE_STRIDE == 0:
        return divide(x, tl.load(scales + rows, mask=is_row, other=1.0))
    else:  # Triton compiles one of the branches, and types what follows a return otherwise
        return divide(x, tl.load(scales + element * SCALE_STRIDE + tl.zeros_like(rows)))


@triton.jit
def plain_levels(z):
    """Return the nearest int8 levels of ``z``, float32."""
    return tl.minimum(tl.maximum((z + ROUNDER) - ROUNDER, -127.0), 127.0)


@triton.jit
def plain_error(y, scales, rows, is_row, NUM: tl.constexpr, Y_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr):
    """Return the squared error of 8-bit rows, float32 ``[ROWS]``, summed from the last element to the first."""
    error = tl.zeros([ROWS], tl.float32)
    for step in range(NUM):
        z = load_scaled(y, scales, NUM - 1 - step, rows, is_row, Y_STRIDE, SCALE_STRIDE)
        distance = z - plain_levels(z)
        error = error + distance * distance
    return error


@triton.jit
def advance(z, cost, levels, BITS: tl.constexpr):
    """Put an element before those that have been coded.

    Args:
        z: float32 ``[ROWS]``, in units of levels.
        cost: float32 ``[states, ROWS]``, least cost of what follows, by state.
        levels: float32 ``[64]``.
        BITS: 4, 2 or 1.
    Returns:
        The new costs, and the bits, int32 ``[states, ROWS]``, that leave a state on the way that costs least.
    """
    branches: tl.constexpr = 1 << BITS
    states: tl.constexpr = 64 >> BITS
    distance = z[None, :] - levels[:, None]
    following = tl.broadcast_to(cost[:, None, :], [states, branches, ROWS])
    path = distance * distance + tl.reshape(following, [64, ROWS])
    path = tl.reshape(path, [branches, states, ROWS])
    least = tl.min(path, axis=0)
    branch = tl.arange(0, branches)[:, None, None]
    return least, tl.min(tl.where(path == least[None, :, :], branch, branches), axis=0)


@triton.jit
def find_costs(
    y,
    scales,
    survivors,
    level_table,
    rows,
    is_row,
    NUM: tl.constexpr,
    BITS: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """Return the least cost of rows by their first state, float32 ``[states, ROWS]``.

    Args:
        y: see :func:`load_scaled`.
        scales: likewise.
        survivors: uint8 ``[NUM, states, ROWS]``, written with ``KEEPS``: what :func:`advance` chose.
        level_table: int8, see ``tables.py``.
        rows: int32 ``[ROWS]``.
        is_row: bool ``[ROWS]``.
        NUM: elements.
        BITS: 4, 2 or 1.
        Y_STRIDE: see :func:`load_scaled`.
        SCALE_STRIDE: likewise.
        KEEPS: write ``survivors``.
    """
    states: tl.constexpr = 64 >> BITS
    state = tl.arange(0, states)
    places = state[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    levels = tl.load(level_table + TABLE_OF_BITS[BITS] + tl.arange(0, 64)).to(tl.float32)
    cost = tl.where(state == 0, 0.0, FAR)[:, None] + tl.zeros([states, ROWS], tl.float32)
    for step in range(NUM):
        element = NUM - 1 - step
        z = load_scaled(y, scales, element, rows, is_row, Y_STRIDE, SCALE_STRIDE)
        cost, branch = advance(z, cost, levels, BITS)
        if KEEPS:
            tl.store(survivors + element * (states * ROWS) + places, branch.to(tl.uint8))
    return cost


@triton.jit
def first_state(cost):
    """Return the first state of least cost, int32 ``[ROWS]``."""
    state = tl.arange(0, cost.shape[0])[:, None]
    least = tl.min(cost, axis=0)
    return tl.min(tl.where(cost == least[None, :], state, cost.shape[0]), axis=0)


@triton.jit
def next_window(survivors, element, state, BITS: tl.constexpr):
    """Return the window of an element that was reached in ``state``, int32 ``[ROWS]``."""
    states: tl.constexpr = 64 >> BITS
    branch = tl.load(survivors + (element * states + state) * ROWS + tl.arange(0, ROWS))
    return state | (branch.to(tl.int32) << (6 - BITS))
