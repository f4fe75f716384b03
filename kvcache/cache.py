"""The KV cache of one sequence: appended layer by layer, attended by tiles, never larger than its byte budget.

In: keys and values after RoPE, and queries. Out: attention outputs. A token starts in float16 (``recent.py``); when it
leaves the recent window it is quantized together with its page (``codec.py``) into the pool (``pool.py``) and stays
as it is. Attention visits the sinks, the pages and the window, and merges them (``online_softmax.py``).

The float16 format takes the same way, with pages of float16.
"""

import torch
from torch import Tensor

from kvcache.codec import decode_pages, encode_page
from kvcache.config import KVCacheConfig
from kvcache.memory import num_pages_per_layer, num_sealed_pages
from kvcache.online_softmax import OnlineSoftmax, merge
from kvcache.pool import PagePool
from kvcache.recent import RecentTokens
from kvcache.transform import rotate, unrotate
from moe_bitnet.errors import ConfigError, ShapeError

# Keys and values that are dequantized at a time: large enough to amortize a call, small beside any budget
# (512 tokens x 8 heads x 128 channels in float32 are 2 MiB each).
TOKENS_PER_TILE = 512


class QuantizedKVCache:
    """Keys and values of one sequence, in at most ``budget_bytes`` bytes that are allocated at once.

    Temporary memory beyond the budget: one chunk of keys, values and queries, and one tile of ``TOKENS_PER_TILE``
    dequantized tokens with its scores. Everything lies in CPU memory and nothing is differentiable.

    A chunk longer than ``num_window_tokens`` attends to the earliest of its own tokens through quantized pages, since
    they were sealed by its append; feed shorter chunks to avoid that.

    Args:
        config: sizes and formats.
        budget_bytes: upper limit of ``allocated_bytes``.

    Raises:
        ConfigError: the budget is smaller than the float16 region of the sinks and the window.
    """

    def __init__(self, config: KVCacheConfig, budget_bytes: int) -> None:
        num_pages = num_pages_per_layer(config, budget_bytes) * config.num_layers
        if num_pages < 0:
            raise ConfigError(
                f"QuantizedKVCache: budget_bytes is {budget_bytes}, but {config.max_recent_tokens} float16 tokens in "
                f"{config.num_layers} layers need {config.recent_bytes}. Give at least that, or lower "
                f"num_sink_tokens, num_window_tokens or page_size."
            )
        self.config = config
        self._page_format = config.page_format
        self._recent = RecentTokens(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_sink_tokens=config.num_sink_tokens,
            num_slots=config.max_recent_tokens,
        )
        self._pool = PagePool(config.page_bytes, num_pages * config.page_bytes)
        # Page ids of every layer, oldest first; all lists are equally long. Pages are taken for all layers when the
        # first layer needs one; the first _num_sealed[layer] of a list are sealed.
        self._page_table: list[list[int]] = [[] for _ in range(config.num_layers)]
        self._num_sealed = [0] * config.num_layers

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return min(self._num_tokens(layer_index) for layer_index in range(self.config.num_layers))

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage that the cache holds, used or not, from its making on; at most the budget."""
        return self._recent.allocated_bytes + self._pool.allocated_bytes

    @torch.no_grad()
    def append(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Add a chunk of tokens to one layer, all of it or nothing.

        The first layer that grows takes the pages for all layers. So a model's step is refused in its first layer,
        before anything has changed, or goes through in all of them.

        Args:
            layer_index: 0 to ``num_layers - 1``.
            key: ``[num_tokens, num_kv_heads, head_dim]``, any float dtype, after RoPE, at least one token.
            value: like ``key``.

        Raises:
            ShapeError: a wrong layer, shape or dtype, or an element that is not finite in float16 (NaN, infinite, or
                beyond 65504); the cache is unchanged.
            CacheFullError: too few pages are free; the cache is unchanged and still attends to what it holds.
        """
        self._check_layer(layer_index)
        if key.shape != value.shape:
            raise ShapeError(
                f"QuantizedKVCache.append: key has shape {list(key.shape)}, value {list(value.shape)}; give both the "
                f"same number of tokens."
            )
        key_value = torch.stack((self._checked_fp16("key", key), self._checked_fp16("value", value)))
        key_value = key_value.transpose(1, 2)  # [2, G, T, D]
        self._reserve_pages(self._num_tokens(layer_index) + key_value.shape[2])
        num_stored = self._recent.append(layer_index, key_value)
        while num_stored < key_value.shape[2]:
            self._seal_oldest_page(layer_index)
            num_stored += self._recent.append(layer_index, key_value[:, :, num_stored:])

    @torch.no_grad()
    def attend(self, layer_index: int, query: Tensor) -> Tensor:
        """Attend causally, with scale ``1 / sqrt(head_dim)``, from the last tokens of one layer.

        Args:
            layer_index: 0 to ``num_layers - 1``.
            query: ``[num_tokens, num_heads, head_dim]``, any float dtype, after RoPE: the queries of the last
                ``num_tokens`` tokens appended to this layer. ``num_heads`` is a multiple of ``num_kv_heads``; query
                head n uses KV head ``n // (num_heads / num_kv_heads)``.

        Returns:
            ``[num_tokens, num_heads, head_dim]`` in the dtype of ``query``; computed in float32.

        Raises:
            ShapeError: a wrong layer, shape or dtype, or more queries than the layer holds tokens.
        """
        self._check_layer(layer_index)
        self._check_query(layer_index, query)
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads = self.config.num_kv_heads
        rows_per_token = num_heads // num_kv_heads
        rows = query.reshape(num_tokens, num_kv_heads, rows_per_token, head_dim).float() * head_dim**-0.5
        rows = rows.transpose(0, 1).flatten(1, 2)  # [G, T * N/G, D]
        first_position = self._num_tokens(layer_index) - num_tokens
        output = merge(
            self._attend_recent(layer_index, OnlineSoftmax(rows, first_position, rows_per_token)),
            self._attend_pages(layer_index, OnlineSoftmax(self._as_keys(rows), first_position, rows_per_token)),
        )
        output = output.reshape(num_kv_heads, num_tokens, rows_per_token, head_dim).transpose(0, 1)  # [T, G, N/G, D]
        return output.reshape(query.shape).to(query.dtype)

    def free(self) -> None:
        """Give all pages back and forget all tokens; the memory stays allocated for the next sequence."""
        for page_ids in self._page_table:
            self._pool.free(page_ids)
        self._page_table = [[] for _ in self._page_table]
        self._num_sealed = [0] * self.config.num_layers
        self._recent.clear()

    def check_integrity(self) -> None:
        """Assert that pages, counts and the pool agree with each other."""
        self._pool.check_integrity()
        self._recent.check_integrity()
        page_ids = [page_id for layer_pages in self._page_table for page_id in layer_pages]
        assert len(set(page_ids)) == len(page_ids), "two entries of the page table share a page"
        assert len(page_ids) == self._pool.num_pages - self._pool.num_free_pages, "a page is held by nobody"
        most_tokens = max(self._num_tokens(layer_index) for layer_index in range(self.config.num_layers))
        for layer_index, layer_pages in enumerate(self._page_table):
            assert len(layer_pages) == num_sealed_pages(self.config, most_tokens), "layers differ in pages taken"
            num_sealed = num_sealed_pages(self.config, self._num_tokens(layer_index))
            assert self._num_sealed[layer_index] == num_sealed, "sealed pages and window do not add up"
            self._pool.read(layer_pages[:num_sealed])  # asserts that they are sealed

    def _num_tokens(self, layer_index: int) -> int:
        return self._recent.num_held(layer_index) + self._num_sealed[layer_index] * self.config.page_size

    def _reserve_pages(self, num_tokens: int) -> None:
        num_missing = num_sealed_pages(self.config, num_tokens) - len(self._page_table[0])
        if num_missing > 0:
            page_ids = self._pool.allocate(num_missing * self.config.num_layers)
            for layer_index, layer_pages in enumerate(self._page_table):
                layer_pages.extend(page_ids[layer_index :: self.config.num_layers])

    def _seal_oldest_page(self, layer_index: int) -> None:
        key, value = self._recent.take_oldest(layer_index, self.config.page_size)
        page_id = self._page_table[layer_index][self._num_sealed[layer_index]]
        self._pool.seal(page_id, encode_page(self._page_format, key, value))
        self._num_sealed[layer_index] += 1

    def _as_keys(self, rows: Tensor) -> Tensor:
        """Rotate queries if the keys of pages are rotated."""
        return rotate(rows) if self._page_format.key.is_rotated else rows

    def _attend_recent(self, layer_index: int, attention: OnlineSoftmax) -> OnlineSoftmax:
        key, value = self._recent.sinks(layer_index).float()
        if key.shape[1] > 0:
            attention.add_tile(key, value, first_position=0)
        key, value = self._recent.window(layer_index).float()
        if key.shape[1] > 0:
            attention.add_tile(key, value, first_position=self._num_tokens(layer_index) - key.shape[1])
        return attention

    def _attend_pages(self, layer_index: int, attention: OnlineSoftmax) -> OnlineSoftmax:
        page_size = self.config.page_size
        pages_per_tile = max(1, TOKENS_PER_TILE // page_size)
        page_ids = self._page_table[layer_index][: self._num_sealed[layer_index]]
        for start in range(0, len(page_ids), pages_per_tile):
            pages = self._pool.read(page_ids[start : start + pages_per_tile])
            key, value = decode_pages(self._page_format, pages)
            attention.add_tile(key, value, first_position=self.config.num_sink_tokens + start * page_size)
        if self._page_format.value.is_rotated:
            attention.weighted_values = unrotate(attention.weighted_values)
        return attention

    def _check_layer(self, layer_index: int) -> None:
        if not 0 <= layer_index < self.config.num_layers:
            raise ShapeError(
                f"QuantizedKVCache: layer_index is {layer_index}, the cache has {self.config.num_layers} layers. "
                f"Pass 0 to {self.config.num_layers - 1}, or make the cache for more layers."
            )

    def _checked_fp16(self, name: str, x: Tensor) -> Tensor:
        heads_and_dim = (self.config.num_kv_heads, self.config.head_dim)
        if x.dim() != 3 or x.shape[0] < 1 or tuple(x.shape[1:]) != heads_and_dim or not x.is_floating_point():
            raise ShapeError(
                f"QuantizedKVCache.append: {name} is {x.dtype} of shape {list(x.shape)}; pass floats of shape "
                f"[num_tokens >= 1, {heads_and_dim[0]}, {heads_and_dim[1]}]."
            )
        x_fp16 = x.to(torch.float16)
        num_bad = x_fp16.numel() - int(x_fp16.isfinite().sum())
        if num_bad:
            raise ShapeError(
                f"QuantizedKVCache.append: {num_bad} elements of {name} are not finite in float16 (largest 65504). "
                f"Look for NaN or overflow in the layer that made them."
            )
        return x_fp16

    def _check_query(self, layer_index: int, query: Tensor) -> None:
        num_kv_heads, head_dim = self.config.num_kv_heads, self.config.head_dim
        num_tokens = self._num_tokens(layer_index)
        is_valid = query.dim() == 3 and query.is_floating_point() and query.shape[2] == head_dim
        if not is_valid or query.shape[1] % num_kv_heads or 0 in query.shape or query.shape[0] > num_tokens:
            raise ShapeError(
                f"QuantizedKVCache.attend: query is {query.dtype} of shape {list(query.shape)}; layer {layer_index} "
                f"holds {num_tokens} tokens. Pass floats of shape [1 to {num_tokens} tokens, a multiple of "
                f"{num_kv_heads} heads, {head_dim}]."
            )
