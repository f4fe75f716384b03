"""Grouped-query attention with rotary embedding, and the seam for a key/value cache.

:class:`AttentionCache` is declared here, beside its only caller; ``kvcache``
fulfils it without either side importing the other.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bitnet.bitlinear import build_linear
from moe_bitnet.config import ModelConfig
from moe_bitnet.layers import RMSNorm, apply_rotary, rotary_tables


class AttentionCache(Protocol):
    """Keys and values of one sequence, held in any format."""

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        ...

    def extend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from the next T tokens to all that is held and to themselves, causally, then hold them too.

        Args:
            layer_index: layers take the same tokens one after the other, each once.
            query: ``[T, N, D]``, after rotary embedding.
            key: ``[T, num_kv_heads, D]``, after rotary embedding.
            value: like ``key``.
        Returns:
            ``[T, N, D]`` in the dtype of ``query``.
        """
        ...


class Attention(nn.Module):
    """The attention half of a block, with its norms.

    Args:
        config: sizes and recipe.
        layer_index: which layer of a cache is this one's.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        has_inner_norm = config.norm_recipe == "inner_norm"
        self.norm = nn.Identity() if has_inner_norm else RMSNorm(config.hidden_size, config.norm_eps)
        inner_eps = config.norm_eps if has_inner_norm else None
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = build_linear(config, config.hidden_size, query_size, inner_eps)
        self.k_proj = build_linear(config, config.hidden_size, kv_size, inner_eps)
        self.v_proj = build_linear(config, config.hidden_size, kv_size, inner_eps)
        # both recipes normalize here: attn_sub_norm in one, the inner norm in the other; a dense model does not
        output_eps = None if config.has_float_backbone else config.norm_eps
        self.o_proj = build_linear(config, query_size, config.hidden_size, output_eps)

    def forward(self, hidden_states: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            hidden_states: float ``[B, S, H]``; with a cache B is 1 and S counts the new tokens.
            cache: holds the tokens before these, or ``None`` to start at position 0.
        Returns:
            float32 ``[B, S, H]``.
        """
        x = self.norm(hidden_states)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, S, heads, D]
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        cos, sin = rotary_tables(positions, self.head_dim, self.rope_theta)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if cache is None:
            output = causal_attention(query, key, value)
        else:
            output = cache.extend(self.layer_index, query[0], key[0], value[0]).unsqueeze(0)
        projected: Tensor = self.o_proj(output.flatten(-2))
        return projected


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to this and earlier tokens of the same sequence, in the autocast dtype.

    Args:
        query: float ``[B, S, N, D]``.
        key: float ``[B, S, num_kv_heads, D]``.
        value: float ``[B, S, num_kv_heads, D]``.
    Returns:
        float32 ``[B, S, N, D]``.
    """
    group_size = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group_size, dim=2) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).float()
