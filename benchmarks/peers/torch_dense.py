"""The same dense shape in plain PyTorch, float16, bfloat16 or float32: the baseline that needs no quantization.

Lean on purpose, so that it is a fair opponent: query, key and value are one product, gate and up
another; a token reads each weight once, and keys and values lie in memory allocated beforehand.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.shape import SyntheticShape
from moe_bitnet.errors import ConfigError

_NORM_EPS = 1e-5
_ROPE_BASE = 10_000.0
_PATTERN_LEN = 2**20


@dataclass(frozen=True)
class _Layer:
    """Weights of a block, ``[out_features, in_features]``; its cache, ``[num_kv_heads, max_seq_len, head_dim]``."""

    attention_norm: Tensor
    query_key_value: Tensor
    attention_output: Tensor
    expert_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return (
            self.attention_norm, self.query_key_value, self.attention_output,
            self.expert_norm, self.gate_up, self.down,
        )  # fmt: skip


class TorchDensePeer:
    """A dense LLaMA-like model with random weights; one sequence at a time.

    Args:
        shape: sizes.
        dtype: of weights, activations and cache.
        max_seq_len: tokens that the cache holds.
        seed: of the weights.
    """

    def __init__(
        self, shape: SyntheticShape, *, dtype: torch.dtype = torch.float16, max_seq_len: int = 1024, seed: int = 0
    ) -> None:
        self.name = f"torch {str(dtype).removeprefix('torch.')}"
        self.shape = shape
        self.dtype = dtype
        self.max_seq_len = max_seq_len
        self._prompt_len = self._length = 0
        generator = torch.Generator().manual_seed(seed)
        pattern = torch.randn(_PATTERN_LEN, generator=generator).to(dtype)
        self._embedding = _random_weight(shape.vocab_size, shape.hidden_size, pattern)
        self._layers = [_random_layer(shape, max_seq_len, pattern) for _ in range(shape.num_layers)]
        self._norm = torch.ones(shape.hidden_size, dtype=dtype)
        self._head = _random_weight(shape.vocab_size, shape.hidden_size, pattern)
        self._cosine, self._sine = _rotary_tables(max_seq_len, shape.head_dim, dtype)
        self._tokens = torch.randint(shape.vocab_size, (max_seq_len,), generator=generator)

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights, embedding and head included; the cache is not counted."""
        weights = [self._embedding, self._norm, self._head]
        for layer in self._layers:
            weights += layer.weights
        return sum(weight.numel() * weight.element_size() for weight in weights)

    @torch.inference_mode()
    def prefill(self, num_tokens: int) -> Tensor:
        """Forget the sequence, and start another with ``num_tokens`` tokens in one batch.

        Returns:
            Logits of the last token, ``[1, vocab_size]``.
        Raises:
            ConfigError: the cache does not hold as many tokens.
        """
        if not 1 <= num_tokens <= self.max_seq_len:
            raise ConfigError(
                f"torch prefill: {num_tokens} tokens; the cache holds 1 to {self.max_seq_len}. "
                f"Give max_seq_len of at least that."
            )
        self._length = 0
        logits = self._forward(self._tokens[:num_tokens])
        self._prompt_len = num_tokens
        return logits

    @torch.inference_mode()
    def decode_token(self) -> Tensor:
        """Append one token and score the next. A full sequence first falls back to its prompt.

        Returns:
            Logits, ``[1, vocab_size]``.
        """
        if self._length >= self.max_seq_len:
            self._length = min(self._prompt_len, self.max_seq_len - 1)
        return self._forward(self._tokens[self._length : self._length + 1])

    def close(self) -> None:
        """Free the weights and the cache."""
        self._layers = []
        self._embedding = self._head = self._norm = torch.empty(0)

    def __enter__(self) -> "TorchDensePeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forward(self, token_ids: Tensor) -> Tensor:
        assert self._layers, "the peer is closed"
        start, end = self._length, self._length + len(token_ids)
        rotary = (self._cosine[start:end], self._sine[start:end])
        hidden_states = self._embedding[token_ids]
        for layer in self._layers:
            hidden_states = hidden_states + self._attend(layer, hidden_states, start, end, rotary)
            hidden_states = hidden_states + _feed_forward(layer, hidden_states)
        self._length = end
        return F.linear(_norm(hidden_states[-1:], self._norm), self._head)

    def _attend(
        self, layer: _Layer, hidden_states: Tensor, start: int, end: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        num_heads, num_kv_heads, head_dim = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        joined = F.linear(_norm(hidden_states, layer.attention_norm), layer.query_key_value)
        heads = joined.view(end - start, num_heads + 2 * num_kv_heads, head_dim)
        rotated = _rotate(heads[:, : num_heads + num_kv_heads], *rotary)
        query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        layer.keys[:, start:end] = key.transpose(0, 1)
        layer.values[:, start:end] = heads[:, num_heads + num_kv_heads :].transpose(0, 1)
        keys, values = layer.keys[:, :end], layer.values[:, :end]
        attended = _attend_one(query, keys, values) if end - start == 1 else _attend_prompt(query, keys, values)
        return F.linear(attended, layer.attention_output)


def _attend_one(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from one token: ``[1, N, D]`` to ``[1, N * D]``.

    The query heads of a key head are rows of one small matrix. Float16 is widened on the way: with 5 key heads on
    2 Zen 5 cores that takes 22 µs instead of 52 at 48 tokens, and 157 instead of 498 at 544.
    """
    work_dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    grouped = query.view(1, keys.shape[0], -1, keys.shape[2])  # [1, num_kv_heads, N / num_kv_heads, D]
    attended = F.scaled_dot_product_attention(
        grouped.to(work_dtype), keys[None].to(work_dtype), values[None].to(work_dtype)
    )
    return attended.to(query.dtype).view(1, -1)


def _attend_prompt(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend causally from a whole prompt: ``[T, N, D]`` to ``[T, N * D]``."""
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True
    )
    return attended[0].transpose(0, 1).reshape(len(query), -1)


def _feed_forward(layer: _Layer, hidden_states: Tensor) -> Tensor:
    gate, up = F.linear(_norm(hidden_states, layer.expert_norm), layer.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down)


def _norm(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, (hidden_states.shape[-1],), weight, _NORM_EPS)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``[T, heads, D]`` by tables ``[T, 1, D]``; the sine of the first half carries the minus."""
    half = heads.shape[-1] // 2
    swapped = torch.cat([heads[..., half:], heads[..., :half]], dim=-1)
    return heads * cosine + swapped * sine


def _rotary_tables(max_seq_len: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = _ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(max_seq_len, dtype=torch.float64)[:, None, None] * frequencies  # [S, 1, D / 2]
    cosine = torch.cat([angles.cos(), angles.cos()], dim=-1)
    sine = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return cosine.to(dtype), sine.to(dtype)


def _random_layer(shape: SyntheticShape, max_seq_len: int, pattern: Tensor) -> _Layer:
    hidden, inner, query_width = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    cache_shape = (shape.num_kv_heads, max_seq_len, shape.head_dim)
    return _Layer(
        attention_norm=torch.ones(hidden, dtype=pattern.dtype),
        query_key_value=_random_weight(query_width + 2 * shape.num_kv_heads * shape.head_dim, hidden, pattern),
        attention_output=_random_weight(hidden, query_width, pattern),
        expert_norm=torch.ones(hidden, dtype=pattern.dtype),
        gate_up=_random_weight(2 * inner, hidden, pattern),
        down=_random_weight(hidden, inner, pattern),
        keys=torch.zeros(cache_shape, dtype=pattern.dtype),
        values=torch.zeros(cache_shape, dtype=pattern.dtype),
    )


def _random_weight(num_rows: int, num_columns: int, pattern: Tensor) -> Tensor:
    """Fill a matrix by repeating a normal pattern, faster than to draw it; products keep their input's size."""
    weight = torch.empty(num_rows * num_columns, dtype=pattern.dtype)
    scaled = pattern * num_columns**-0.5
    for start in range(0, len(weight), len(pattern)):
        part = weight[start : start + len(pattern)]
        part.copy_(scaled[: len(part)])
    return weight.view(num_rows, num_columns)
