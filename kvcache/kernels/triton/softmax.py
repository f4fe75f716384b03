"""Running softmax of a tile of rows: scores and sums are ``[tokens or channels, rows]``, a row is a column.

Keys and values are the left operands of all products: what was looked up in registers goes from there into the tensor
cores, and few rows waste little, because their side may be eight wide.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-3.4028234663852886e38)
"""The least finite float32 instead of minus infinity: differences of two such maxima stay defined."""
PAGE_SIZE = tl.constexpr(64)


@triton.jit
def page_weights(scores, is_seen):
    """Return each row's largest score of a page, float32 ``[rows]``, and ``exp(score - largest)``, 0 where hidden."""
    scores = tl.where(is_seen, scores, LEAST)
    largest = tl.max(scores, axis=0)
    return largest, tl.where(is_seen, tl.exp(scores - largest[None, :]), 0.0)


@triton.jit
def add_page(maximum, weight_sum, value_sum, page_maximum, weights, page_values):
    """Add a page to the running softmax.

    Args:
        maximum: float32 ``[rows]``.
        weight_sum: float32 ``[rows]``, sum of ``exp(score - maximum)``.
        value_sum: float32 ``[channels, rows]``, the same sum over values.
        page_maximum: float32 ``[rows]``.
        weights: float32 ``[64, rows]``.
        page_values: float32 ``[channels, rows]``.
    """
    larger = tl.maximum(maximum, page_maximum)
    own, others = tl.exp(maximum - larger), tl.exp(page_maximum - larger)
    weight_sum = weight_sum * own + tl.sum(weights, axis=0) * others
    value_sum = value_sum * own[None, :] + page_values * others[None, :]
    return larger, weight_sum, value_sum


@triton.jit
def store_partial(
    maxima,
    weight_sums,
    value_sums,
    maximum,
    weight_sum,
    value_sum,
    rows,
    is_row,
    first_query,
    HEAD_DIM: tl.constexpr,
):
    """Write a tile's running softmax to its slot.

    Args:
        maxima: float32 ``[slots, queries]``.
        weight_sums: float32 ``[slots, queries]``.
        value_sums: float32 ``[slots, queries, HEAD_DIM]``.
        maximum: float32 ``[rows]``.
        weight_sum: float32 ``[rows]``.
        value_sum: float32 ``[channels, rows]``.
        rows: int32 ``[rows]``, which queries they are, counted from ``first_query``.
        is_row: bool ``[rows]``.
        first_query: int64, counted over all slots.
        HEAD_DIM: channels that there are.
    """
    tl.store(maxima + first_query + rows, maximum, mask=is_row)
    tl.store(weight_sums + first_query + rows, weight_sum, mask=is_row)
    channels = tl.arange(0, value_sum.shape[0])
    mask = (channels < HEAD_DIM)[:, None] & is_row[None, :]
    places = rows[None, :] * HEAD_DIM + channels[:, None]
    tl.store(value_sums + first_query * HEAD_DIM + places, value_sum, mask=mask)
