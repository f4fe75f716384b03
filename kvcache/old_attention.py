"""How much attention old tokens get: what says which errors of packed keys and values a model would notice.

In: queries and keys of one layer, after RoPE. Out: for every query and for every old token a sum of squared attention
weights. With weights p an error e of a value moves the output by ``p e``, and errors of different tokens are
independent, so their powers ``p * p`` add up. *Old* are the tokens that a cache would have packed by then: those
behind the sinks and before the window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.page import PAGE_SIZE

# Pages as a cache of usual settings keeps them in float16: 64 tokens of sinks, a window of 128 to 191.
_NUM_SINK_TOKENS = PAGE_SIZE
_NUM_WINDOW_PAGES = 2
# Queries whose scores exist at one time.
_QUERY_ROWS = 128


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
    grouped = query.reshape(num_kv_heads, -1, *query.shape[1:])  # [G, N / G, num_new, D]
    received = key.new_zeros(num_kv_heads, num_tokens, dtype=torch.float32)
    given = []
    for start in range(first, num_tokens, _QUERY_ROWS):
        end = min(start + _QUERY_ROWS, num_tokens)
        row = torch.arange(start, end, device=key.device).unsqueeze(1)
        column = torch.arange(end, device=key.device)
        scores = scaling * (grouped[:, :, start - first : end - first] @ key[:, None, :end].mT).float()
        weights = scores.masked_fill(column > row, -torch.inf).softmax(dim=-1)
        squares = weights.square() * _is_old(row, column)  # [G, N / G, rows, end]
        given.append(squares.sum(dim=-1).flatten(0, 1))
        received[:, :end] += squares.sum(dim=(1, 2))
    return OldAttention(torch.cat(given, dim=1), received)


def _is_old(row: Tensor, column: Tensor) -> Tensor:
    is_sealed = column // PAGE_SIZE < row // PAGE_SIZE - _NUM_WINDOW_PAGES
    return is_sealed & (column >= _NUM_SINK_TOKENS)
