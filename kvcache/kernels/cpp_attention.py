"""Attention over pages in C++: the tensors of a call as the structure of ``csrc/page_attend.h``.

Shapes, dtypes and strides are checked here, once, before the call. The library uses the threads that torch uses.
"""

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcache.frame import LayerFrame
from kvcache.kernels.batch import PagedBatch
from kvcache.kernels.checks import check_tokens
from kvcache.page import LayerFormat
from kvcache.scale import scales
from kvcache.trellis import all_levels
from moe_bitnet.errors import BackendError, ShapeError
from moe_bitnet.kernels.structures import require_cpu

MAX_SEGMENTS = 3
MAX_HEAD_DIM = 256

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class CallStructure(ctypes.Structure):
    """``page_attend_call``: bare pointers, so every tensor is kept alive while it is used."""

    _fields_ = (
        *((name, _INT64) for name in ("num_kv_heads", "num_heads", "head_dim", "num_tokens", "num_sequences")),
        *((name, _INT32) for name in ("key_bits", "value_bits", "num_segments", "num_threads")),
        ("segment_words", _INT32 * MAX_SEGMENTS),
        ("segment_bits", _INT32 * MAX_SEGMENTS),
        *((name, _POINTER) for name in ("levels", "scales", "query_matrix", "key_mean", "value_matrix", "value_mean")),
        *((name, _POINTER) for name in ("query", "key", "value", "output", "packed", "exact")),
        ("packed_stride", _INT64),
        ("exact_stride", _INT64),
        *((name, _POINTER) for name in ("row_offsets", "page_offsets", "page_ids", "page_is_packed")),
        ("page_num_tokens", _POINTER),
        ("scale", ctypes.c_float),
    )


class Attention:
    """The operation ``paged_attention`` of a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._page_attend = library.page_attend
        self._page_attend.restype = _INT32
        self._page_attend.argtypes = (ctypes.POINTER(CallStructure),)
        self._levels, self._scales = all_levels(), scales()
        # What does not change from one call of a layer to the next; it goes with the layer's frame.
        self._layers: WeakKeyDictionary[LayerFrame, dict[LayerFormat, CallStructure]] = WeakKeyDictionary()

    def paged_attention(
        self, layer_format: LayerFormat, frame: LayerFrame, query: Tensor, key: Tensor, value: Tensor, batch: PagedBatch
    ) -> Tensor:
        """Twin of :func:`kvcache.kernels.backend_reference.paged_attention`.

        Raises:
            ShapeError: tensors of other sizes or dtypes, not contiguous, or not on the CPU.
            BackendError: no memory for intermediate results.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            require_cpu(name, tensor, torch.float32)
        check_tokens(layer_format, query, key, value)
        _check_batch(layer_format, batch, query.shape[0])
        output = torch.empty_like(query)
        call = CallStructure.from_buffer_copy(self._layer_structure(layer_format, frame))
        call.num_heads, call.num_tokens = query.shape[1], query.shape[0]
        call.num_sequences, call.num_threads = len(batch.row_offsets) - 1, torch.get_num_threads()
        call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        call.output = output.data_ptr()
        call.packed = batch.packed.data_ptr() + batch.packed_layer_offset
        call.exact = batch.exact.data_ptr() + batch.exact_layer_offset
        call.packed_stride, call.exact_stride = batch.packed.stride(0), batch.exact.stride(0)
        call.row_offsets, call.page_offsets = batch.row_offsets.data_ptr(), batch.page_offsets.data_ptr()
        call.page_ids, call.page_is_packed = batch.page_ids.data_ptr(), batch.page_is_packed.data_ptr()
        call.page_num_tokens = batch.page_num_tokens.data_ptr()
        call.scale = batch.scale
        if self._page_attend(ctypes.byref(call)):
            raise BackendError("paged_attention: no memory for intermediate results. Attend from shorter chunks.")
        return output

    def _layer_structure(self, layer_format: LayerFormat, frame: LayerFrame) -> CallStructure:
        structures = self._layers.setdefault(frame, {})
        call = structures.get(layer_format)
        if call is None:
            call = structures[layer_format] = self._make_structure(layer_format, frame)
        return call

    def _make_structure(self, layer_format: LayerFormat, frame: LayerFrame) -> CallStructure:
        key, value = layer_format.key, layer_format.value
        num_kv_heads, head_dim = layer_format.num_kv_heads, layer_format.head_dim
        if head_dim > MAX_HEAD_DIM:
            raise ShapeError(f"paged_attention: head_dim is {head_dim}; at most {MAX_HEAD_DIM} is supported.")
        call = CallStructure(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            key_bits=key.num_bits,
            value_bits=value.num_bits,
            num_segments=len(key.segments),
            segment_words=(_INT32 * MAX_SEGMENTS)(*(segment.num_words for segment in key.segments)),
            segment_bits=(_INT32 * MAX_SEGMENTS)(*(segment.num_bits for segment in key.segments)),
            levels=self._levels.data_ptr(),
            scales=self._scales.data_ptr(),
        )
        matrix, vector = (num_kv_heads, head_dim, head_dim), (num_kv_heads, head_dim)
        if key.num_bits < 16:
            call.query_matrix = _float_pointer("key matrix", frame.key.query_matrix, matrix)
            call.key_mean = _float_pointer("key mean", frame.key.mean, vector)
        if value.num_bits < 16:
            call.value_matrix = _float_pointer("value matrix", frame.value.decode_matrix, matrix)
            call.value_mean = _float_pointer("value mean", frame.value.mean, vector)
        return call


def _float_pointer(name: str, tensor: Tensor, shape: tuple[int, ...]) -> int:
    require_cpu(f"the frame's {name}", tensor, torch.float32)
    if tensor.shape != shape:
        raise ShapeError(f"paged_attention: the frame's {name} has shape {list(tensor.shape)}, not {list(shape)}.")
    return tensor.data_ptr()


def _check_batch(layer_format: LayerFormat, batch: PagedBatch, num_tokens: int) -> None:
    require_cpu("row_offsets", batch.row_offsets, torch.int64)
    require_cpu("page_offsets", batch.page_offsets, torch.int64)
    require_cpu("page_ids", batch.page_ids, torch.int32)
    require_cpu("page_is_packed", batch.page_is_packed, torch.uint8)
    require_cpu("page_num_tokens", batch.page_num_tokens, torch.int32)
    for name, memory, offset, num_bytes in (
        ("packed", batch.packed, batch.packed_layer_offset, layer_format.layer_bytes),
        ("exact", batch.exact, batch.exact_layer_offset, layer_format.exact_layer_bytes),
    ):
        require_cpu(name, memory, torch.uint8)
        if memory.dim() != 2 or not 0 <= offset <= memory.shape[1] - num_bytes:
            raise ShapeError(
                f"paged_attention: {name} has shape {list(memory.shape)}; a layer of {num_bytes} bytes at {offset} "
                f"does not fit into a page. Pass [num_pages, page_bytes]."
            )
    num_pages = len(batch.page_ids)
    is_consistent = (
        len(batch.row_offsets) == len(batch.page_offsets) >= 1
        and int(batch.row_offsets[-1]) == num_tokens
        and int(batch.page_offsets[-1]) == num_pages
        and len(batch.page_is_packed) == len(batch.page_num_tokens) == num_pages
    )
    if not is_consistent:
        raise ShapeError(
            f"paged_attention: offsets end at {batch.row_offsets[-1:].tolist()} rows and "
            f"{batch.page_offsets[-1:].tolist()} pages, but there are {num_tokens} tokens and {num_pages} page ids."
        )
