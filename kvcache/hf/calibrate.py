"""Second moments of a model's queries, keys and values after RoPE, from any text.

The model runs once over the tokens, in chunks, with transformers' own cache and sdpa; a recorder sits where attention
is computed.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvcache.hf.attention import mark, sdpa
from kvcache.hf.cache import use_paged_attention
from kvcache.hf.support import attention_shape
from kvcache.moments import Moments
from moe_bitnet.errors import ShapeError


@torch.no_grad()
def calibrate(model: Any, token_ids: Tensor, chunk_size: int = 512) -> Moments:
    """Collect the moments that ``paged_cache(..., calibration=)`` takes.

    Half of their weight follows the attention that tokens get once they are 128 to 191 tokens back; sequences of fewer
    than 257 tokens have none of these. A few thousand tokens a sequence, of the kinds of text to come, are best.

    Args:
        model: a causal language model of transformers; its attention is as before afterwards.
        token_ids: int64 ``[num_tokens]``, or ``[num_sequences, num_tokens]`` without padding; a few thousand in all.
        chunk_size: tokens a forward pass; memory for sequences grows with ``chunk_size * num_tokens``.

    Raises:
        ConfigError: the model is not supported.
        ShapeError: there are no tokens, or ``token_ids`` is not of one or two dimensions.
    """
    if token_ids.ndim not in (1, 2) or token_ids.numel() == 0:
        raise ShapeError(f"calibrate: token_ids has shape {list(token_ids.shape)}; give [num_tokens], at least one.")
    shape = attention_shape(model)
    moments = Moments.zeros(shape.num_layers, shape.num_kv_heads, shape.head_dim)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    use_paged_attention(model)
    try:
        for sequence in token_ids.to(model.device).view(-1, token_ids.shape[-1]):
            cache = {cache_argument(model): _RecordingCache(moments)}
            for chunk in sequence.split(chunk_size):
                model(chunk.unsqueeze(0), use_cache=True, logits_to_keep=1, **cache)
    finally:
        model.set_attn_implementation(implementation)
    return moments


def cache_argument(model: Any) -> str:
    """Return how the model's forward calls its cache: the name changed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _RecordingCache(DynamicCache):
    """A plain cache whose keys bring a recorder along."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self._moments = moments

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return mark(keys.view_as(keys), _Recorder(self._moments, layer_idx, key_states, value_states)), values


@dataclass(frozen=True)
class _Recorder:
    moments: Moments
    layer_index: int
    new_key: Tensor  # [1, num_kv_heads, num_new, head_dim]
    new_value: Tensor

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Count the new tokens, and old ones by the attention that they get; attend as usual."""
        new_query, new_key, new_value, all_keys, all_values = (
            x[0].float().transpose(0, 1) for x in (query, self.new_key, self.new_value, key, value)
        )
        self.moments.add(self.layer_index, new_query, new_key, new_value)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.moments.add_attended(self.layer_index, new_query, all_keys, all_values, scaling)
        return sdpa(module, query, key, value, attention_mask, **kwargs)
