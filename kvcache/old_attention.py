"""How much attention old tokens get: what says which errors of packed keys and values a model would notice.

In: queries and keys of one layer, after RoPE. Out: for every query and for every old token a sum of squared attention
weights. With weights p an error e of a value moves the output by ``p e``, and errors of different tokens are
independent, so their powers ``p * p`` add up. *Old* are the tokens that a cache would have packed by then: those
behind the sinks and before the window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.page import PAGE_SIZE

# Pages as a cache of usual settings keeps them in float16: 64 tokens of sinks, a window of 128 to 191.
_NUM_SINK_TOKENS = PAGE_SIZE
_NUM_WINDOW_PAGES = 2


@dataclass(frozen=True)
class OldAttention:
    """Squared attention weights on old tokens.

    Attributes:
        given: float32 ``[num_heads, num_new]``, by query, summed over old tokens.
        received: float32 ``[num_kv_heads, num_tokens]``, by token, summed over the queries of a KV head.
    """

    given: Tensor
    received: Tensor


def old_attention(query: Tensor, key: Tensor, scaling: float) -> OldAttention:
    """Sum the squares of attention weights on old tokens.

    Args:
        query: ``[num_heads, num_new, head_dim]``, of the last ``num_new`` tokens.
        key: ``[num_kv_heads, num_tokens, head_dim]``, of all tokens, on the same device.
        scaling: factor of scores.
    """
    num_kv_heads, num_tokens, _ = key.shape
    first = num_tokens - query.shape[1]
    grouped = query.float().reshape(num_kv_heads, -1, *query.shape[1:])  # [G, N / G, num_new, D]
    given = grouped.new_zeros(grouped.shape[:3])
    received = grouped.new_zeros(num_kv_heads, num_tokens)
    for start, end in _page_rows(first, num_tokens):  # all queries of a page have the same old tokens
        old = slice(_NUM_SINK_TOKENS, (start // PAGE_SIZE - _NUM_WINDOW_PAGES) * PAGE_SIZE)
        if old.stop <= old.start:
            continue
        rows = slice(start - first, end - first)
        scores = scaling * grouped[:, :, rows] @ key[:, None, :end].float().mT
        is_later = torch.ones(end - start, end - start, dtype=torch.bool, device=key.device).triu(1)
        scores[..., start:].masked_fill_(is_later, -torch.inf)
        squares = scores.softmax(dim=-1)[..., old].square()  # [G, N / G, rows, old tokens]
        given[:, :, rows] = squares.sum(dim=-1)
        received[:, old] += squares.sum(dim=(1, 2))
    return OldAttention(given.flatten(0, 1), received)


def _page_rows(first: int, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of tokens from ``first`` on that lie in one page each."""
    start = first
    while start < num_tokens:
        end = min((start // PAGE_SIZE + 1) * PAGE_SIZE, num_tokens)
        yield start, end
        start = end
