"""One step of several sequences, the same for all layers: what they attend to and where their new tokens go.

Built once, after the pages are planned, and used by every layer: page arrays as the kernels read them, and for tokens
that only fill up a page the places where they are stored, so that a layer writes them with one store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcache.exact_planes import ExactPlanes
from kvcache.page import PAGE_SIZE
from kvcache.page_table import PageTable, num_pages_of

# Sequences with more new tokens write them run by run, which is faster then.
MAX_SCATTERED_TOKENS = 8


@dataclass(frozen=True)
class PageArrays:
    """The arrays of :class:`kvcache.kernels.batch.PagedBatch` that do not depend on the layer."""

    row_offsets: Tensor
    page_offsets: Tensor
    page_ids: Tensor
    page_is_packed: Tensor
    page_num_tokens: Tensor


@dataclass(frozen=True)
class ScatteredTokens:
    """Where single tokens go.

    Attributes:
        rows: int64 ``[num_tokens]``, which of the step's tokens; ``None`` if all.
        page_ids: exact pages, as ``ExactPlanes`` takes them.
        slots: places in the pages, likewise.
    """

    rows: Tensor | None
    page_ids: Any
    slots: Any


class Step:
    """A planned step.

    Args:
        sequence_ids: who takes part.
        tables: their pages, planned.
        num_new_tokens: how many tokens each appends.
        device: where the kernels read the arrays.
        planes: where the tokens go.

    Attributes:
        row_offsets: first row of each sequence among the step's tokens, and their number at the end.
        runs: sequences (by their place in ``tables``) that write run by run and may seal pages.
        scattered: the tokens of all others, or ``None``.
    """

    def __init__(
        self,
        sequence_ids: tuple[int, ...],
        tables: Sequence[PageTable],
        num_new_tokens: tuple[int, ...],
        device: torch.device,
        planes: ExactPlanes,
    ) -> None:
        self.sequence_ids, self.tables, self.num_new_tokens = sequence_ids, tables, num_new_tokens
        self.row_offsets = [0, *np.cumsum(num_new_tokens).tolist()]
        self.runs = [
            index
            for index, (table, count) in enumerate(zip(tables, num_new_tokens, strict=True))
            if count > MAX_SCATTERED_TOKENS or table.planned_sealed_end > min(table.sealed_ends)
        ]
        self._device = device
        runs = set(self.runs)
        self.scattered = self._scatter([index for index in range(len(tables)) if index not in runs], planes)
        self._arrays: dict[tuple[int, ...], PageArrays] = {}

    def page_arrays(self, layer_index: int) -> PageArrays:
        """Return what a layer attends to; layers that have sealed the same pages share the arrays."""
        sealed_ends = tuple([table.sealed_ends[layer_index] for table in self.tables])
        arrays = self._arrays.get(sealed_ends)
        if arrays is None:
            arrays = self._arrays[sealed_ends] = self._build(sealed_ends)
        return arrays

    def _build(self, sealed_ends: tuple[int, ...]) -> PageArrays:
        counts = [num_pages_of(table.length) for table in self.tables]
        offsets = np.cumsum([0, *counts])
        page_ids = np.empty(offsets[-1], np.int32)
        is_packed = np.zeros(offsets[-1], np.uint8)
        num_tokens = np.full(offsets[-1], PAGE_SIZE, np.int32)
        for table, sealed_end, start, count in zip(self.tables, sealed_ends, offsets.tolist(), counts, strict=False):
            page_ids[start : start + count] = table.exact_ids[:count]
            packed = slice(table.num_sink_pages, min(sealed_end, count))
            if packed.stop > packed.start:
                page_ids[start + packed.start : start + packed.stop] = table.packed_ids[packed]
                is_packed[start + packed.start : start + packed.stop] = 1
            if count:
                num_tokens[start + count - 1] = table.length - PAGE_SIZE * (count - 1)
        arrays = (np.array(self.row_offsets, np.int64), offsets.astype(np.int64), page_ids, is_packed, num_tokens)
        return PageArrays(*(torch.from_numpy(array).to(self._device) for array in arrays))

    def _scatter(self, indices: Sequence[int], planes: ExactPlanes) -> ScatteredTokens | None:
        if not indices:
            return None
        rows: list[int] = []
        page_ids: list[int] = []
        positions: list[int] = []
        for index in indices:
            table, count = self.tables[index], self.num_new_tokens[index]
            rows += range(self.row_offsets[index], self.row_offsets[index] + count)
            own_positions = range(table.length, table.length + count)
            positions += own_positions
            page_ids += [int(table.exact_ids[position // PAGE_SIZE]) for position in own_positions]
        are_all = len(rows) == self.row_offsets[-1]
        return ScatteredTokens(
            rows=None if are_all else torch.tensor(rows, device=self._device),
            page_ids=planes.indices(np.array(page_ids, np.int64)),
            slots=planes.indices(np.array(positions, np.int64) % PAGE_SIZE),
        )
