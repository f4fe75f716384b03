"""The operations in plain PyTorch, for any device's tensors moved to the CPU: the formula, page by page.

Integers are those of every backend: queries become int8 digits a segment, weights of a packed page become 8-bit digits
relative to the page's largest one. So results of backends differ by the order of float sums alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache import codec
from kvcache.frame import LayerFrame, PlaneFrame
from kvcache.kernels.batch import PagedBatch
from kvcache.page import LayerFormat, PlaneFormat
from moe_bitnet.kernels.registry import Operation

DEVICE_TYPES = ("cpu",)

LARGEST_DIGIT = 127
LOW_DIGIT_BASE = 128  # an 8-bit key's query has two digits: high * 128 + low
LARGEST_WEIGHT = {8: 65535, 4: 255, 2: 255}  # by value bits


def encode_page(layer_format: LayerFormat, frame: LayerFrame, exact: Tensor, packed: Tensor) -> None:
    """Quantize one layer of a page.

    Args:
        layer_format: sizes and bits.
        frame: the maps of the layer.
        exact: uint8 ``[exact layer bytes]``, contiguous: float16 planes, finite.
        packed: uint8 ``[layer_bytes]``, contiguous, written.
    """
    packed.copy_(codec.encode_layer(layer_format, frame, exact))


def paged_attention(
    layer_format: LayerFormat, frame: LayerFrame, query: Tensor, key: Tensor, value: Tensor, batch: PagedBatch
) -> Tensor:
    """Attend from new tokens to the pages of their sequence and to the new tokens up to themselves.

    Args:
        layer_format: sizes and bits of the layer.
        frame: the maps of the layer.
        query: float32 ``[T, num_heads, head_dim]``; head n uses KV head ``n // (num_heads / num_kv_heads)``.
        key: float32 ``[T, num_kv_heads, head_dim]``, used as float16.
        value: like ``key``.
        batch: the pages, and which rows belong to which sequence.

    Returns:
        float32 ``[T, num_heads, head_dim]``.
    """
    output = torch.empty_like(query)
    row_offsets, page_offsets = batch.row_offsets.tolist(), batch.page_offsets.tolist()
    for sequence in range(len(row_offsets) - 1):
        rows = slice(row_offsets[sequence], row_offsets[sequence + 1])
        pages = range(page_offsets[sequence], page_offsets[sequence + 1])
        if rows.stop > rows.start:
            attention = _SequenceAttention(layer_format, frame, query[rows] * batch.scale, batch)
            for page in pages:
                attention.add_page(page)
            output[rows] = attention.finish(key[rows], value[rows])
    return output


OPERATIONS: dict[str, Operation] = {"encode_page": encode_page, "paged_attention": paged_attention}


@dataclass
class _Partial:
    """Running softmax of all rows: m, sum of exp(score - m), and the same sum over values; ``[G, R, ...]``."""

    maximum: Tensor
    weight_sum: Tensor
    value_sum: Tensor

    @classmethod
    def empty(cls, num_kv_heads: int, num_rows: int, head_dim: int) -> "_Partial":
        # the least finite number instead of -inf: differences of two such maxima stay defined
        least = torch.full((num_kv_heads, num_rows, 1), torch.finfo(torch.float32).min)
        return cls(least, torch.zeros_like(least), torch.zeros(num_kv_heads, num_rows, head_dim))

    def add(self, other: "_Partial") -> None:
        maximum = torch.maximum(self.maximum, other.maximum)
        own, others = (self.maximum - maximum).exp(), (other.maximum - maximum).exp()
        self.weight_sum = own * self.weight_sum + others * other.weight_sum
        self.value_sum = own * self.value_sum + others * other.value_sum
        self.maximum = maximum


class _SequenceAttention:
    """The rows of one sequence: R = new tokens times query heads of a KV head, for each of G KV heads."""

    def __init__(self, layer_format: LayerFormat, frame: LayerFrame, query: Tensor, batch: PagedBatch) -> None:
        self._format, self._frame, self._batch = layer_format, frame, batch
        num_kv_heads, head_dim = layer_format.num_kv_heads, layer_format.head_dim
        self._shape = query.shape
        self._num_tokens = query.shape[0]
        grouped = query.reshape(query.shape[0], num_kv_heads, -1, head_dim)  # [T, G, N / G, D]
        self._query = grouped.transpose(0, 1).flatten(1, 2)  # [G, R, D]
        if layer_format.key.num_bits < 16:
            self._key_query = _MappedQuery(layer_format.key, frame.key, self._query)
        self._packed = _Partial.empty(num_kv_heads, self._query.shape[1], head_dim)
        self._exact = _Partial.empty(num_kv_heads, self._query.shape[1], head_dim)

    def add_page(self, page: int) -> None:
        page_id, num_tokens = int(self._batch.page_ids[page]), int(self._batch.page_num_tokens[page])
        if not self._batch.page_is_packed[page]:
            start = self._batch.exact_layer_offset
            exact = self._batch.exact[page_id, start : start + self._format.exact_layer_bytes]
            key, value = codec.read_exact_layer(self._format, exact)
            self._exact.add(self._attend(key[:, :num_tokens], value[:, :num_tokens]))
            return
        start = self._batch.packed_layer_offset
        layer = self._batch.packed[page_id, start : start + self._format.layer_bytes]
        self._packed.add(self._attend_packed(layer.view(self._format.num_kv_heads, -1), num_tokens))

    def finish(self, key: Tensor, value: Tensor) -> Tensor:
        """Add the new tokens, ``[T, G, D]`` each, and return the output ``[T, N, D]``."""
        key, value = (x.half().float().transpose(0, 1) for x in (key, value))
        token = torch.arange(self._num_tokens)
        row_token = token.repeat_interleave(self._query.shape[1] // self._num_tokens)
        self._exact.add(self._attend(key, value, is_hidden=token > row_token[:, None]))
        if self._format.value.num_bits < 16:
            frame = self._frame.value
            mapped = self._packed.value_sum @ frame.decode_matrix
            self._packed.value_sum = mapped + self._packed.weight_sum * frame.mean.unsqueeze(1)
        self._exact.add(self._packed)
        output = self._exact.value_sum / self._exact.weight_sum
        num_kv_heads, _, head_dim = output.shape
        output = output.reshape(num_kv_heads, self._num_tokens, -1, head_dim).transpose(0, 1)  # [T, G, N / G, D]
        return output.reshape(self._shape)

    def _attend(self, key: Tensor, value: Tensor, is_hidden: Tensor | None = None) -> _Partial:
        scores = self._query @ key.transpose(1, 2)
        if is_hidden is not None:
            scores = scores.masked_fill(is_hidden, -torch.inf)
        maximum = scores.amax(dim=2, keepdim=True)
        weights = (scores - maximum).exp()
        return _Partial(maximum, weights.sum(dim=2, keepdim=True), weights @ value)

    def _attend_packed(self, heads: Tensor, num_tokens: int) -> _Partial:
        key_bytes = self._format.key.plane_bytes
        key_planes, value_planes = heads[:, :key_bytes], heads[:, key_bytes:]
        if self._format.key.num_bits == 16:
            scores = self._query @ codec.decode_keys(self._format.key, key_planes).transpose(1, 2)
        else:
            scores = self._key_query.scores(key_planes)
        scores = scores[:, :, :num_tokens]
        maximum = scores.amax(dim=2, keepdim=True)
        weights = (scores - maximum).exp()
        value_sum = self._sum_values(value_planes, weights)
        return _Partial(maximum, weights.sum(dim=2, keepdim=True), value_sum)

    def _sum_values(self, value_planes: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum ``[G, R, D]`` of a page's values, in their frame."""
        value_format = self._format.value
        num_tokens = weights.shape[2]
        if value_format.num_bits == 16:
            return weights @ codec.decode_values(value_format, value_planes)[:, :num_tokens]
        levels = codec.value_levels(value_format, value_planes)[:, :num_tokens]
        scaled = weights * codec.plane_scales(value_format, value_planes)[:, None, :num_tokens]
        largest_weight = LARGEST_WEIGHT[value_format.num_bits]
        largest = scaled.amax(dim=2, keepdim=True)
        unit = largest / largest_weight
        integers = (scaled * (largest_weight / largest.clamp(min=torch.finfo(torch.float32).tiny))).round()
        sums = integers.double() @ levels.double()  # exact: below 2**31
        return sums.float() * unit


class _MappedQuery:
    """Queries in the keys' frame, as int8 digits a segment."""

    def __init__(self, key_format: PlaneFormat, frame: PlaneFrame, query: Tensor) -> None:
        self._format = key_format
        mapped = query @ frame.decode_matrix.transpose(1, 2)  # [G, R, D]
        self._offset = (query * frame.mean.unsqueeze(1)).sum(dim=2, keepdim=True)
        sizes = [segment.num_elements for segment in key_format.segments]
        parts = []
        self._units = []
        for part, segment in zip(torch.split(mapped, sizes, dim=2), key_format.segments, strict=True):
            largest = LARGEST_DIGIT * LOW_DIGIT_BASE if segment.num_bits == 8 else LARGEST_DIGIT
            unit = part.abs().amax(dim=2, keepdim=True) / largest
            parts.append((part / unit.clamp(min=torch.finfo(torch.float32).tiny)).round())
            self._units.append(unit)
        self._digits, self._sizes = parts, sizes

    def scores(self, key_planes: Tensor) -> Tensor:
        """Return float32 scores ``[G, R, 64]`` of one page."""
        levels = codec.key_levels(self._format, key_planes)
        total = torch.zeros(1)
        for digits, unit, part in zip(self._digits, self._units, torch.split(levels, self._sizes, dim=2), strict=True):
            dots = digits.double() @ part.double().transpose(1, 2)  # exact: below 2**31
            total = total + dots.float() * unit
        return total * codec.plane_scales(self._format, key_planes).unsqueeze(1) + self._offset
