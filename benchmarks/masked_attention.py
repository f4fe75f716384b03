"""Attention that sees the keys and values of old pages as a format gives them back, over a whole text at once.

In decoding a token sees a page as float16 while it is among the sinks or in the window, and as the format gives it back
later. Over a whole text at once each query therefore has its own mixture of both, page by page. Here both scores are
computed and the mask chooses: the result is that of decoding, at the speed of one pass. For experiments; a cache is run
by ``kv_quality``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvcache.page import PAGE_SIZE

Quantize = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Layer index, keys and values ``[G, T, D]`` to what a format gives back, in the same shapes."""

_NAME = "moe_bitnet_masked"
_QUERY_ROWS = 512
_SINK_PAGES = 1
_WINDOW_PAGES = 2


@dataclass
class Errors:
    """Sums over layers of what a format changed.

    Attributes:
        key_signal: squares of keys around their mean over the text.
        key_error: squares of changes.
        value_signal: like ``key_signal``.
        value_error: like ``key_error``.
        output_signal: squares of attention outputs.
        output_error: squares of their changes, the layer's input being equal.
    """

    key_signal: float = 0.0
    key_error: float = 0.0
    value_signal: float = 0.0
    value_error: float = 0.0
    output_signal: float = 0.0
    output_error: float = 0.0


@dataclass
class MaskedAttention:
    """What transformers calls in place of its own attention.

    Attributes:
        quantize: the format; ``None`` leaves all as it is.
        errors: what it changed so far.
    """

    quantize: Quantize | None = None
    errors: Errors = field(default_factory=Errors)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend; query ``[1, N, T, D]``, key and value ``[1, G, T, D]``; returns ``[1, T, N, D]``."""
        query, key, value = query[0] * kwargs["scaling"], key[0], value[0]
        grouped = query.unflatten(0, (len(key), -1))  # [G, N / G, T, D]
        output = _attend(grouped, key, value, None)
        if self.quantize is not None:
            layer_index: Any = module.layer_idx  # an attribute of every attention layer, which nn.Module cannot type
            far_key, far_value = self.quantize(int(layer_index), key, value)
            exact_output, output = output, _attend(grouped, key, value, (far_key, far_value))
            self._count(key, far_key, value, far_value)
            self.errors.output_signal += _power(exact_output)
            self.errors.output_error += _power(output - exact_output)
        return output.flatten(0, 1).transpose(0, 1).unsqueeze(0), None

    def _count(self, key: Tensor, far_key: Tensor, value: Tensor, far_value: Tensor) -> None:
        old = slice(_SINK_PAGES * PAGE_SIZE, key.shape[1] // PAGE_SIZE * PAGE_SIZE)
        key, far_key, value, far_value = (x[:, old] for x in (key, far_key, value, far_value))
        self.errors.key_signal += _power(key - key.mean(dim=1, keepdim=True))
        self.errors.key_error += _power(far_key - key)
        self.errors.value_signal += _power(value - value.mean(dim=1, keepdim=True))
        self.errors.value_error += _power(far_value - value)


@contextmanager
def masked_attention(model: Any) -> Iterator[MaskedAttention]:
    """Have a model of transformers attend through the yielded object inside the block."""
    attention = MaskedAttention()
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield attention
    finally:
        model.set_attn_implementation(before)


def _attend(query: Tensor, key: Tensor, value: Tensor, far: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return ``[G, N / G, T, D]``, some rows of queries at a time."""
    num_tokens = key.shape[1]
    output = torch.empty_like(query)
    for start in range(0, num_tokens, _QUERY_ROWS):
        end = min(start + _QUERY_ROWS, num_tokens)
        row, column = torch.arange(start, end)[:, None], torch.arange(end)
        rows = query[:, :, start:end]
        scores = torch.einsum("grtd,gkd->grtk", rows, key[:, :end])
        if far is not None:
            is_far = (column // PAGE_SIZE >= _SINK_PAGES) & (column // PAGE_SIZE < row // PAGE_SIZE - _WINDOW_PAGES)
            scores = torch.where(is_far, torch.einsum("grtd,gkd->grtk", rows, far[0][:, :end]), scores)
        weights = scores.masked_fill(column > row, -torch.inf).softmax(dim=-1)
        if far is None:
            output[:, :, start:end] = torch.einsum("grtk,gkd->grtd", weights, value[:, :end])
        else:
            near_sum = torch.einsum("grtk,gkd->grtd", weights * ~is_far, value[:, :end])
            output[:, :, start:end] = near_sum + torch.einsum("grtk,gkd->grtd", weights * is_far, far[1][:, :end])
    return output


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())
