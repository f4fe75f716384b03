"""The cache that ``generate`` of transformers is given.

In: a model and a budget. Out: ``HFPagedCache``. The model is switched to the attention function of ``attention.py``;
with any other cache, or none, it computes as before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvcache.cache import PagedKVCache
from kvcache.calibration import calibrated_frames
from kvcache.config import KVCacheConfig
from kvcache.hf.attention import PAGED_ATTENTION, PagedLength, check_plain_attention, mark, register
from kvcache.hf.rows import SequenceRows
from kvcache.hf.support import attention_shape
from kvcache.moments import Moments
from moe_bitnet.errors import ConfigError, ShapeError


def paged_cache(
    model: Any,
    budget_bytes: int,
    *,
    key_bits: int = 8,
    value_bits: int = 8,
    calibration: Moments | None = None,
    batch_size: int = 1,
    num_beams: int = 1,
    layer_bits: tuple[tuple[int, int, int], ...] = (),
    num_sink_tokens: int = 64,
    num_window_tokens: int = 128,
    device: torch.device | str | None = None,
) -> "HFPagedCache":
    """Make a cache for a model and switch the model to paged attention.

    The switch is ``model.set_attn_implementation("moe_bitnet_paged")``; calls without this cache give the results of
    "sdpa". Pass the cache to ``model.generate`` or ``model`` as ``past_key_values=`` (from transformers 5.24 on also
    ``cache=``). Attention weights (``output_attentions``) are not available.

    Args:
        model: a causal language model of transformers.
        budget_bytes: what all keys and values may take.
        key_bits: 16, 8, 4 or 2.
        value_bits: 16, 8, 4 or 2.
        calibration: what ``calibrate`` returned for this model; ``None`` works without, a little worse at 4 and 2 bits.
        batch_size: rows of a batch, times ``num_return_sequences``.
        num_beams: of beam search; the cache has room for ``batch_size * num_beams`` sequences.
        layer_bits: ``(layer_index, key_bits, value_bits)`` of layers that differ from the rest.
        num_sink_tokens: first tokens of a row, kept in float16; a multiple of 64.
        num_window_tokens: most recent tokens, kept in float16.
        device: where pages lie and attention is computed; ``None`` for the model's device.

    Raises:
        ConfigError: the model is not supported (the message says why), or the budget is too small.
    """
    shape = attention_shape(model)
    config = KVCacheConfig(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        layer_bits=layer_bits,
        num_sink_tokens=num_sink_tokens,
        num_window_tokens=num_window_tokens,
    )
    frames = None if calibration is None else calibrated_frames(calibration, config)
    device = torch.device(model.device if device is None else device)
    store = PagedKVCache(config, budget_bytes, frames, num_sequences=batch_size * num_beams, device=device)
    use_paged_attention(model)
    rows = SequenceRows(store, config.num_layers, device)
    return HFPagedCache(rows, config, model.config.get_text_config(decoder=True))


def use_paged_attention(model: Any) -> None:
    """Switch a model to the attention function of this package.

    Raises:
        ConfigError: transformers did not take it.
    """
    register()
    model.set_attn_implementation(PAGED_ATTENTION)
    used = model.config.get_text_config(decoder=True)._attn_implementation
    if used != PAGED_ATTENTION:
        raise ConfigError(f"paged_cache: {type(model).__name__} keeps attention {used!r}; it cannot use a paged cache.")


class PagedLayer(CacheLayerMixin):
    """One layer's view of the rows; holds no tensor of its own."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, layer_index: int, rows: SequenceRows, pending: "_Pending") -> None:
        super().__init__()
        self._layer_index = layer_index
        self._rows = rows
        self._pending = pending

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory was taken when the cache was made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys, marked, and the new values; they are appended when they are attended to."""
        self._pending.announce(self._layer_index)
        return mark(key_states, self), value_states

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attend to all of the layer's tokens; shapes as of ``attention.paged_attention_forward``."""
        self._pending.clear()
        check_plain_attention(module, attention_mask, kwargs)
        query, key, value = (tensor.detach().transpose(1, 2) for tensor in (query, key, value))
        return self._rows.extend(self._layer_index, query, key, value, attention_mask, kwargs.get("scaling"))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the next pass attends to, and 0."""
        return PagedLength(self.get_seq_length() + query_length), 0

    def get_seq_length(self) -> int:
        """Return the positions of a row that all layers hold, padding included; the same throughout a step."""
        return self._rows.num_positions

    def get_max_length(self) -> int:
        """Return -1: the budget is counted in bytes."""
        return -1


class HFPagedCache(Cache):
    """Quantized keys and values of a batch, in a fixed number of bytes; made by ``paged_cache``.

    Keys and values enter as float16 and never carry gradients. Positions that the padding mask hides take no memory.
    A ``CacheFullError`` leaves the cache as it was before the step; crop it, reset it, or use it on.

    Attributes:
        config: sizes and widths.
        store: the pages, with ``allocated_bytes``, ``num_free_pages`` and ``check_integrity()``.
    """

    def __init__(self, rows: SequenceRows, config: KVCacheConfig, model_config: Any) -> None:
        self.config = config
        self._rows = rows
        self._model_config = model_config
        self._pending = _Pending()
        super().__init__(layers=[PagedLayer(index, rows, self._pending) for index in range(config.num_layers)])

    @property
    def store(self) -> PagedKVCache:
        """The pages of all rows."""
        return self._rows.store

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the cache holds from its making on; at most the budget."""
        return self.store.allocated_bytes

    @property
    def batch_size(self) -> int:
        """Rows of the batch, or -1 before the first forward pass."""
        return self._rows.batch_size or -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values ``[batch_size, num_kv_heads, num_new, head_dim]``, after RoPE.

        Raises:
            ConfigError: the model does not use paged attention.
            ShapeError: sizes differ from those of the model that the cache was made for.
        """
        used = self._model_config._attn_implementation
        if used != PAGED_ATTENTION:
            raise ConfigError(
                f"HFPagedCache: the model's attention is {used!r} by now. Call "
                f"model.set_attn_implementation({PAGED_ATTENTION!r}), or pass another cache."
            )
        self._check_shapes(key_states, value_states, layer_idx)
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    def reset(self) -> None:
        """Forget all tokens; the next forward pass may bring another batch size."""
        self._pending.clear()
        self._rows.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget positions at the end of every row.

        Args:
            tokens_to_remove: minus how many; 0 does nothing.

        Raises:
            ConfigError: the number is positive, or a row would end inside a packed page; nothing is changed.
        """
        if tokens_to_remove > 0:
            raise ConfigError(
                f"HFPagedCache.crop: tokens_to_remove is {tokens_to_remove}; give minus the number of tokens to remove."
            )
        self._rows.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from the rows at ``beam_idx``, int64 ``[batch_size]``."""
        self._rows.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row ``repeats`` times, side by side; copies share their pages."""
        self._rows.select([row for row in range(self._rows.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices`` (int64, or bool ``[batch_size]``)."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._rows.select(rows.tolist())

    def fork(self) -> "HFPagedCache":
        """Return a cache that holds the same rows, sharing pages and budget with this one."""
        return HFPagedCache(self._rows.fork(), self.config, self._model_config)

    def __deepcopy__(self, memo: dict[int, object]) -> "HFPagedCache":
        """Fork: the usual way to continue one prompt several times is ``copy.deepcopy(cache)``."""
        return self.fork()

    def _check_shapes(self, key: Tensor, value: Tensor, layer_index: int) -> None:
        config = self.config
        is_fitting = layer_index < config.num_layers and key.shape == value.shape and key.ndim == 4
        if not is_fitting or (key.shape[1], key.shape[3]) != (config.num_kv_heads, config.head_dim):
            raise ShapeError(
                f"HFPagedCache: layer {layer_index} brings keys {list(key.shape)} and values {list(value.shape)}; the "
                f"cache was made for {config.num_layers} layers of [batch_size, {config.num_kv_heads}, num_new, "
                f"{config.head_dim}]. Make one for this model."
            )


class _Pending:
    """The layer whose new keys were handed out and not attended to yet.

    Attention that never asks the mark would see the new keys alone. This shows it at the next layer.
    """

    def __init__(self) -> None:
        self._layer_index: int | None = None

    def announce(self, layer_index: int) -> None:
        if self._layer_index is not None:
            raise ConfigError(
                f"HFPagedCache: layer {self._layer_index} took its keys and did not attend through "
                f"{PAGED_ATTENTION!r}; its output is wrong. This model cannot use a paged cache, or a forward pass was "
                f"interrupted: then call cache.reset()."
            )
        self._layer_index = layer_index

    def clear(self) -> None:
        self._layer_index = None
