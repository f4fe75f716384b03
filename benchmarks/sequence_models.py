"""What ``sequence_fill`` fills caches with: a Hugging Face model, this project's own, and a shape without weights.

Tokens are arbitrary: how many fit does not depend on what they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_model import MODEL_NAME, load_real_model
from benchmarks.synthetic import build_packed_model
from kvcache.cache import PagedKVCache
from kvcache.config import KVCacheConfig
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.errors import ConfigError

_NUM_KINDS = 7  # of random chunks, so that pages differ


class Subject(ABC):
    """A model with a cache.

    Attributes:
        weights: where its weights are from.
    """

    weights: str
    _num_layers: int
    _num_kv_heads: int
    _head_dim: int

    def cache_config(self, key_bits: int, value_bits: int) -> KVCacheConfig:
        """Return the cache of the model's sizes."""
        return KVCacheConfig(self._num_layers, self._num_kv_heads, self._head_dim, key_bits, value_bits)

    @abstractmethod
    def start(self, key_bits: int, value_bits: int, budget_bytes: int) -> PagedKVCache:
        """Make an empty cache and return its store."""

    @abstractmethod
    def stop(self) -> None:
        """Let go of the cache."""

    @abstractmethod
    def append(self, num_tokens: int) -> None:
        """Pass tokens through the model, behind those that the cache holds, up to the last one's logits."""

    @abstractmethod
    def store_random(self, num_tokens: int) -> None:
        """Store random keys and values of tokens in every layer."""

    def _random(self, num_tokens: int, layer_index: int, num_heads: int | None = None) -> Tensor:
        """Draw ``[num_tokens, num_heads, head_dim]``."""
        generator = torch.Generator().manual_seed(layer_index % _NUM_KINDS)
        return torch.randn(num_tokens, num_heads or self._num_kv_heads, self._head_dim, generator=generator)


class HuggingFaceSubject(Subject):
    """SmolLM2-135M in transformers, in float32; with random weights where the real ones are missing.

    Raises:
        ConfigError: transformers is missing.
    """

    def __init__(self) -> None:
        try:
            self._model, self.weights = load_real_model()[0], MODEL_NAME
        except ConfigError as error:
            self._model, self.weights = _random_llama(KNOWN_SHAPES["smollm2-135m"]), f"random ({error})"
        from kvcache.hf.support import attention_shape

        shape = attention_shape(self._model)
        self._num_layers, self._num_kv_heads, self._head_dim = shape.num_layers, shape.num_kv_heads, shape.head_dim
        self._cache: Any = None

    def start(self, key_bits: int, value_bits: int, budget_bytes: int) -> PagedKVCache:
        """See the base class."""
        from kvcache.hf import paged_cache

        self._cache = paged_cache(self._model, budget_bytes, key_bits=key_bits, value_bits=value_bits)
        store: PagedKVCache = self._cache.store
        return store

    def stop(self) -> None:
        """See the base class."""
        self._cache = None

    def append(self, num_tokens: int) -> None:
        """See the base class."""
        from kvcache.hf.calibrate import cache_argument

        token_ids = _token_ids(self._cache.get_seq_length(), num_tokens, self._model.config.vocab_size)
        cache = {cache_argument(self._model): self._cache}
        self._model(token_ids, use_cache=True, logits_to_keep=1, **cache)

    def store_random(self, num_tokens: int) -> None:
        """See the base class."""
        no_module = nn.Module().eval()
        for layer_index, layer in enumerate(self._cache.layers):
            key = self._random(num_tokens, layer_index).transpose(0, 1).unsqueeze(0)  # [1, G, T, D]
            new_key, new_value = self._cache.update(key, key, layer_index)
            layer.attend(no_module, key, new_key, new_value, None)


class _StoredSubject(Subject):
    """What keeps one sequence in a store of its own; fulfils ``moe_bitnet.attention.AttentionCache``."""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self._num_layers, self._num_kv_heads, self._head_dim = num_layers, num_kv_heads, head_dim
        self._store: PagedKVCache | None = None
        self._sequence_id = 0

    def start(self, key_bits: int, value_bits: int, budget_bytes: int) -> PagedKVCache:
        """See the base class."""
        self._store = PagedKVCache(self.cache_config(key_bits, value_bits), budget_bytes)
        self._sequence_id = self._store.new_sequence()
        return self._store

    def stop(self) -> None:
        """See the base class."""
        self._store = None

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        assert self._store is not None
        return self._store.length(self._sequence_id)

    def extend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PagedKVCache.extend``."""
        assert self._store is not None
        return self._store.extend(layer_index, [self._sequence_id], query, key, value)

    def store_random(self, num_tokens: int) -> None:
        """See the base class."""
        for layer_index in range(self._num_layers):
            key = self._random(num_tokens, layer_index)
            self.extend(layer_index, key, key, key)


class TernarySubject(_StoredSubject):
    """This project's mixture of experts in the demo's shape, packed in 2 bits.

    It computes with one thread, as the command line does with models so small (``moe_bitnet/cli/threads.py``).
    """

    weights = "random ternary, 2 bits"

    def __init__(self) -> None:
        config = PRESETS["demo"].model_config(PRESETS["demo"].vocab_size, "ternary")
        super().__init__(config.num_layers, config.num_kv_heads, config.head_dim)
        self._model = build_packed_model(config, "2bit", float_dtype=torch.float32)
        torch.set_num_threads(1)

    def append(self, num_tokens: int) -> None:
        """See the base class."""
        self._model(_token_ids(self.length, num_tokens, self._model.config.vocab_size), self)


class ShapeSubject(_StoredSubject):
    """A shape of which only attention runs: its weights would not fit."""

    weights = "none: attention alone"

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape.num_layers, shape.num_kv_heads, shape.head_dim)
        self._num_heads = shape.num_heads

    def append(self, num_tokens: int) -> None:
        """Attend and append in every layer, with random queries, keys and values."""
        for layer_index in range(self._num_layers):
            key = self._random(num_tokens, layer_index)
            self.extend(layer_index, self._random(num_tokens, layer_index, self._num_heads), key, key)


def _token_ids(start: int, num_tokens: int, vocab_size: int) -> Tensor:
    """Return arbitrary ids ``[1, num_tokens]``."""
    return (torch.arange(start, start + num_tokens) * 7919 % vocab_size).unsqueeze(0)


def _random_llama(shape: ModelShape) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ConfigError(f"transformers is missing ({error}). Run pip install 'moe-bitnet[hf]'.") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.has_tied_embeddings,
        max_position_embeddings=shape.max_seq_len,
    )
    return LlamaForCausalLM(config).eval()


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "smollm2-135m": HuggingFaceSubject,
    "ternary-moe-demo": TernarySubject,
    "llama-3-8b": lambda: ShapeSubject(KNOWN_SHAPES["llama-3-8b"]),
}
"""Makers of the models, by name."""
