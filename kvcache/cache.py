"""The KV cache of several sequences: attention over pages, appended layer by layer.

In: queries, keys and values after RoPE, of the new tokens of one layer. Out: attention outputs. A token starts in a
float16 page (``exact_planes.py``); when its page leaves the window it is quantized, once, into a packed page
(``kernels``) and stays as it is. ``page_store.py`` says who owns which page, ``step_plan.py`` what a step needs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcache.calibration import plain_frames
from kvcache.call_checks import checked_counts, checked_fp16
from kvcache.config import KVCacheConfig
from kvcache.exact_planes import ExactPlanes
from kvcache.frame import LayerFrame
from kvcache.kernels import select
from kvcache.kernels.batch import PagedBatch
from kvcache.page import PAGE_SIZE
from kvcache.page_store import PageStore
from kvcache.page_table import PageTable
from kvcache.step import Step
from moe_bitnet.errors import ConfigError, ShapeError


class PagedKVCache(PageStore):
    """Keys and values of several sequences, in at most ``budget_bytes`` bytes that are allocated at once.

    A model's step calls ``extend`` once for every layer, with the same sequences and numbers of tokens. The first layer
    reserves pages for all of them, so a step is refused there, before anything has changed, or goes through. If it
    fails later for another reason, ``truncate(sequence_id, length(sequence_id))`` brings all layers back.

    Temporary memory beyond the budget: one layer's new queries, keys and values, and what the kernels need. Nothing is
    differentiable. One thread at a time may use a cache.

    Args:
        config: sizes and formats.
        budget_bytes: upper limit of ``allocated_bytes``.
        frames: the maps of every layer, from ``calibration.py``; ``None`` for those that need no data.
        num_sequences: sequences that are sure of their exact pages; more can live beside them while pages last.
        device: where pages and computations are.

    Raises:
        ConfigError: the budget is smaller than the exact pages, or frames and layers differ in number.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        budget_bytes: int,
        frames: Sequence[LayerFrame] | None = None,
        num_sequences: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_sequences < 1:
            raise ConfigError(f"PagedKVCache: num_sequences is {num_sequences}; give at least 1.")
        if frames is not None and len(frames) != config.num_layers:
            raise ConfigError(f"PagedKVCache: {len(frames)} frames for {config.num_layers} layers; give one a layer.")
        self._device = torch.device(device)
        layer_frames = [frame.to(self._device) for frame in (plain_frames(config) if frames is None else frames)]
        super().__init__(config, budget_bytes, layer_frames, frames is not None, num_sequences, self._device)
        self._planes = ExactPlanes(self._exact, config.exact_page_format)
        self._step: Step | None = None
        self._encode_page = select("encode_page", self._device.type)
        self._paged_attention = select("paged_attention", self._device.type)
        layers = range(config.num_layers)
        self._exact_offsets = [config.exact_page_format.layer_offset(layer_index) for layer_index in layers]
        self._packed_offsets = [self._format.layer_offset(layer_index) for layer_index in layers]

    @torch.no_grad()
    def extend(
        self,
        layer_index: int,
        sequence_ids: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_new_tokens: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend causally from new tokens to their past and to themselves, then append them to one layer.

        Args:
            layer_index: 0 to ``num_layers - 1``.
            sequence_ids: different sequences.
            query: ``[T, num_heads, head_dim]``, any float dtype, after RoPE: the new tokens of all sequences, one
                sequence after the other. ``num_heads`` is a multiple of ``num_kv_heads``; query head n uses KV head
                ``n // (num_heads / num_kv_heads)``.
            key: ``[T, num_kv_heads, head_dim]``, after RoPE; rounded to float16.
            value: like ``key``.
            num_new_tokens: at least 1 for each sequence, T in all; ``None`` if all have equally many.
            scale: of the scores; ``None`` for ``1 / sqrt(head_dim)``.

        Returns:
            ``[T, num_heads, head_dim]`` in the dtype of ``query``; computed in float32.

        Raises:
            ShapeError: a wrong layer, shape or dtype, a layer that has already had its turn in this step, or an
                element of keys or values that is not finite in float16 (NaN, infinite, or beyond 65504).
            CacheFullError: too few pages are free. In both cases nothing is changed, and other sequences can go on.
        """
        counts = checked_counts(self.config, layer_index, sequence_ids, query, key, value, num_new_tokens)
        key_fp16, value_fp16 = checked_fp16("key", key, self._device), checked_fp16("value", value, self._device)
        step = self._step_of(layer_index, tuple(sequence_ids), counts)
        output: Tensor = self._paged_attention(
            self._format.layers[layer_index],
            self._frames[layer_index],
            query.detach().float().contiguous(),
            key_fp16.float(),
            value_fp16.float(),
            self._batch(step, layer_index, scale),
        )
        self._append(step, layer_index, key_fp16, value_fp16)
        return output.to(query.dtype)

    def _step_of(self, layer_index: int, sequence_ids: tuple[int, ...], counts: tuple[int, ...]) -> Step:
        """Return the step that is under way, or plan it."""
        step = self._step
        if step is not None and (step.sequence_ids != sequence_ids or step.num_new_tokens != counts):
            step = None
        tables = step.tables if step is not None else [self._table(sequence_id) for sequence_id in sequence_ids]
        for sequence_id, table, count in zip(sequence_ids, tables, counts, strict=True):
            if table.is_between_layers and (table.is_done[layer_index] or table.planned_length != table.length + count):
                raise ShapeError(
                    f"KV cache: layer {layer_index} cannot take {count} tokens of sequence {sequence_id} now: a step "
                    f"from {table.length} to {table.planned_length} tokens is under way, and layers "
                    f"{[index for index, is_done in enumerate(table.is_done) if is_done]} have had their turn. Extend "
                    f"the other layers by the same tokens, or truncate the sequence to {table.length}."
                )
        if step is None:
            self._reserve(tables, counts)
            step = self._step = Step(sequence_ids, tables, counts, self._device, self._planes)
        return step

    def _batch(self, step: Step, layer_index: int, scale: float | None) -> PagedBatch:
        arrays = step.page_arrays(layer_index)
        return PagedBatch(
            packed=self._packed.memory,
            exact=self._exact.memory,
            packed_layer_offset=self._packed_offsets[layer_index],
            exact_layer_offset=self._exact_offsets[layer_index],
            row_offsets=arrays.row_offsets,
            page_offsets=arrays.page_offsets,
            page_ids=arrays.page_ids,
            page_is_packed=arrays.page_is_packed,
            page_num_tokens=arrays.page_num_tokens,
            scale=self.config.head_dim**-0.5 if scale is None else scale,
        )

    def _append(self, step: Step, layer_index: int, key: Tensor, value: Tensor) -> None:
        scattered = step.scattered
        if scattered is not None:
            own = slice(None) if scattered.rows is None else scattered.rows
            self._planes.write_scattered(layer_index, scattered.page_ids, scattered.slots, key[own], value[own])
        for index in step.runs:
            rows = slice(step.row_offsets[index], step.row_offsets[index + 1])
            self._append_runs(step.tables[index], layer_index, key[rows], value[rows])
        for table in step.tables:
            if table.finish_layer(layer_index):
                self._step = None
                if table.planned_sealed_end > table.settled_end:
                    self._settle(table)

    def _append_runs(self, table: PageTable, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Write tokens page by page and seal what the step's end leaves behind, so that exact pages can be reused.

        If this fails half-way, the layer still has its old tokens: the pages that they fill are sealed before another
        page may take over their exact pages, and later pages count only when all is written.
        """
        sealed_end = table.sealed_ends[layer_index]
        for page_index in range(sealed_end, min(table.planned_sealed_end, table.length // PAGE_SIZE)):
            self._seal(table, layer_index, page_index)
            sealed_end = table.sealed_ends[layer_index] = page_index + 1
        num_tokens, num_written = table.length, 0
        while num_written < key.shape[0]:
            page_index, first_slot = divmod(num_tokens + num_written, PAGE_SIZE)
            run = slice(num_written, min(num_written + PAGE_SIZE - first_slot, key.shape[0]))
            page_id = int(table.exact_ids[page_index])
            self._planes.write_run(layer_index, page_id, first_slot, key[run], value[run])
            num_written = run.stop
            is_full = (num_tokens + num_written) % PAGE_SIZE == 0
            if is_full and sealed_end <= page_index < table.planned_sealed_end:
                self._seal(table, layer_index, page_index)
                sealed_end = page_index + 1
        table.sealed_ends[layer_index] = sealed_end

    def _seal(self, table: PageTable, layer_index: int, page_index: int) -> None:
        """Quantize one layer of a full page."""
        layer_format = self._format.layers[layer_index]
        start = self._packed_offsets[layer_index]
        exact = self._planes.layer_bytes(layer_index, int(table.exact_ids[page_index]))
        packed = self._packed.memory[int(table.packed_ids[page_index]), start : start + layer_format.layer_bytes]
        self._encode_page(layer_format, self._frames[layer_index], exact, packed)

    def _forget_step(self) -> None:
        self._step = None


class QuantizedKVCache:
    """The cache of one sequence, as :class:`moe_bitnet.attention.AttentionCache` wants it.

    Args:
        config: sizes and formats.
        budget_bytes: upper limit of ``allocated_bytes``.
        frames: see :class:`PagedKVCache`.

    Raises:
        ConfigError: the budget is too small.
    """

    def __init__(self, config: KVCacheConfig, budget_bytes: int, frames: Sequence[LayerFrame] | None = None) -> None:
        self.config = config
        self._cache = PagedKVCache(config, budget_bytes, frames)
        self._sequence_ids = (self._cache.new_sequence(),)

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return self._cache.length(self._sequence_ids[0])

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage that the cache holds, used or not, from its making on; at most the budget."""
        return self._cache.allocated_bytes

    def extend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from new tokens to their past and themselves, then append them; see :meth:`PagedKVCache.extend`.

        Args:
            layer_index: 0 to ``num_layers - 1``.
            query: ``[T, num_heads, head_dim]``, any float dtype, after RoPE.
            key: ``[T, num_kv_heads, head_dim]``, after RoPE.
            value: like ``key``.

        Returns:
            ``[T, num_heads, head_dim]`` in the dtype of ``query``.
        """
        return self._cache.extend(layer_index, self._sequence_ids, query, key, value)

    def truncate(self, num_tokens: int) -> None:
        """Forget the tokens behind the first ``num_tokens``; see :meth:`PagedKVCache.truncate`."""
        self._cache.truncate(self._sequence_ids[0], num_tokens)

    def free(self) -> None:
        """Forget all tokens; the memory stays allocated for the next sequence."""
        self._cache.free(self._sequence_ids[0])
        self._sequence_ids = (self._cache.new_sequence(),)

    def check_integrity(self) -> None:
        """Assert that pages and their owners agree."""
        self._cache.check_integrity()
