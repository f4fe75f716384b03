"""Where tokens are written: the keys and values of every layer within the exact pages.

Views of the pool's memory, made once: ``keys[layer]`` is float16 ``[num_pages, num_kv_heads, head_dim, 64]``,
``values[layer]`` ``[num_pages, num_kv_heads, 64, head_dim]`` (the planes that ``page.py`` draws). On the CPU they are
NumPy arrays, whose indexing takes a tenth of the time of a tensor's; elsewhere tensors. Both index alike.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcache.page import PAGE_SIZE, PageFormat
from kvcache.pool import PagePool


class ExactPlanes:
    """Writes tokens into exact pages and hands out the bytes of a layer.

    Args:
        pool: the exact pages.
        page_format: 16 bits in every layer.
    """

    def __init__(self, pool: PagePool, page_format: PageFormat) -> None:
        self._memory = pool.memory
        self._is_cpu = pool.memory.device.type == "cpu"
        self._slices: list[slice] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        for layer_index, layer in enumerate(page_format.layers):
            start = page_format.layer_offset(layer_index)
            self._slices.append(slice(start, start + layer.layer_bytes))
            planes = pool.memory[:, self._slices[-1]].view(torch.float16)
            num_heads, head_dim = layer.num_kv_heads, layer.head_dim
            planes = planes.view(pool.num_pages, num_heads, 2, PAGE_SIZE * head_dim)
            keys, values = planes.unbind(2)
            self._keys.append(self._indexable(keys.view(pool.num_pages, num_heads, head_dim, PAGE_SIZE)))
            self._values.append(self._indexable(values.view(pool.num_pages, num_heads, PAGE_SIZE, head_dim)))

    def layer_bytes(self, layer_index: int, page_id: int) -> Tensor:
        """View one layer of a page: uint8 ``[exact layer bytes]``."""
        return self._memory[page_id, self._slices[layer_index]]

    def write_run(self, layer_index: int, page_id: int, first_slot: int, key: Tensor, value: Tensor) -> None:
        """Put consecutive tokens into one page.

        Args:
            layer_index: which layer of the page.
            page_id: which page.
            first_slot: where in the page the first token goes, 0 to 63.
            key: float16 ``[num_tokens, num_kv_heads, head_dim]``.
            value: like ``key``.
        """
        slots = slice(first_slot, first_slot + key.shape[0])
        self._keys[layer_index][page_id, :, :, slots] = self._indexable(key.permute(1, 2, 0))
        self._values[layer_index][page_id, :, slots] = self._indexable(value.transpose(0, 1))

    def indices(self, values: npt.NDArray[np.int64]) -> Any:
        """Return integers as ``write_scattered`` takes them."""
        return values if self._is_cpu else torch.from_numpy(values).to(self._memory.device)

    def write_scattered(self, layer_index: int, page_ids: Any, slots: Any, key: Tensor, value: Tensor) -> None:
        """Put each token where it belongs, with one store for all.

        Args:
            layer_index: which layer.
            page_ids: ``[num_tokens]``, from ``indices``.
            slots: ``[num_tokens]``, 0 to 63, from ``indices``.
            key: float16 ``[num_tokens, num_kv_heads, head_dim]``.
            value: like ``key``.
        """
        # index arrays around a slice: the indexed axis comes first, [num_tokens, num_kv_heads, head_dim]
        self._keys[layer_index][page_ids, :, :, slots] = self._indexable(key)
        self._values[layer_index][page_ids, :, slots] = self._indexable(value)

    def _indexable(self, x: Tensor) -> Any:
        return x.numpy() if self._is_cpu else x
