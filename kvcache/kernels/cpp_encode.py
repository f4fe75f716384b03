"""Quantizing a page in C++: the tensors of a call as the structures of ``csrc/page_encode.h``.

Shapes, dtypes and strides are checked here, once, before the call. Bytes are those of :mod:`kvcache.codec`; so are the
tables of levels, scales and steps, which are handed over with every call. The planes of all heads are spread over the
threads that torch uses.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcache.codec import SCALE_STEPS
from kvcache.frame import LayerFrame, PlaneFrame
from kvcache.page import LayerFormat, PlaneFormat, Segment
from kvcache.scale import scales
from kvcache.trellis import LEVEL_UNIT, all_levels
from moe_bitnet.errors import BackendError, ShapeError
from moe_bitnet.kernels.structures import require_cpu

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class SegmentStructure(ctypes.Structure):
    """``page_segment``."""

    _fields_ = (("num_elements", _INT32), ("num_bits", _INT32))


class PlaneStructure(ctypes.Structure):
    """``page_encode_plane``: bare pointers, so the frame is kept alive while it is used."""

    _fields_ = (
        ("num_bits", _INT32),
        ("num_segments", _INT32),
        ("segments", ctypes.POINTER(SegmentStructure)),
        ("mean", _POINTER),
        ("encode_matrix", _POINTER),
        ("segment_weights", _POINTER),
    )


class ConstantsStructure(ctypes.Structure):
    """``page_encode_constants``."""

    _fields_ = (
        ("levels", _POINTER),
        ("scales", _POINTER),
        ("scale_steps", _POINTER),
        ("num_scale_steps", _INT64),
        ("level_unit", ctypes.c_double),
    )


class Encoder:
    """The operation ``encode_page`` of a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._page_encode = library.page_encode
        self._page_encode.restype = _INT32
        plane = ctypes.POINTER(PlaneStructure)
        self._page_encode.argtypes = (
            ctypes.POINTER(ConstantsStructure), _INT64, _INT64, plane, plane, _POINTER, _POINTER, _INT32
        )  # fmt: skip
        self._levels = all_levels().float()
        self._scales = scales()
        self._scale_steps = torch.tensor(SCALE_STEPS, dtype=torch.int32)
        self._constants = ConstantsStructure(
            self._levels.data_ptr(),
            self._scales.data_ptr(),
            self._scale_steps.data_ptr(),
            len(SCALE_STEPS),
            LEVEL_UNIT,
        )

    def encode_page(self, layer_format: LayerFormat, frame: LayerFrame, exact: Tensor, packed: Tensor) -> None:
        """Twin of :func:`kvcache.kernels.backend_reference.encode_page`, byte for byte.

        Raises:
            ShapeError: tensors of other sizes or dtypes, not contiguous, or not on the CPU.
            BackendError: no memory for scratch.
        """
        num_kv_heads, head_dim = layer_format.num_kv_heads, layer_format.head_dim
        _require_bytes("exact", exact, layer_format.exact_layer_bytes)
        _require_bytes("packed", packed, layer_format.layer_bytes)
        key = _plane_structure("key", layer_format.key, num_kv_heads, frame.key)
        value = _plane_structure("value", layer_format.value, num_kv_heads, frame.value)
        status = self._page_encode(
            ctypes.byref(self._constants),
            num_kv_heads,
            head_dim,
            ctypes.byref(key),
            ctypes.byref(value),
            exact.data_ptr(),
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        if status:
            raise BackendError("encode_page: no memory for scratch. Use fewer threads, or free memory.")


def _require_bytes(name: str, tensor: Tensor, num_bytes: int) -> None:
    require_cpu(name, tensor, torch.uint8)
    if tensor.numel() != num_bytes:
        raise ShapeError(
            f"encode_page: {name} has {tensor.numel()} bytes; the layer takes {num_bytes}. Pass one layer of one page."
        )


def _plane_structure(name: str, plane_format: PlaneFormat, num_kv_heads: int, frame: PlaneFrame) -> PlaneStructure:
    if plane_format.num_bits == 16:
        return PlaneStructure(num_bits=16)
    segments, head_dim = plane_format.segments, plane_format.head_dim
    _require_floats(f"{name}.mean", frame.mean, (num_kv_heads, head_dim))
    _require_floats(f"{name}.encode_matrix", frame.encode_matrix, (num_kv_heads, head_dim, head_dim))
    if name == "key":
        _require_floats(f"{name}.segment_weights", frame.segment_weights, (num_kv_heads, len(segments)))
    return PlaneStructure(
        plane_format.num_bits,
        len(segments),
        _segment_structures(segments),
        frame.mean.data_ptr(),
        frame.encode_matrix.data_ptr(),
        frame.segment_weights.data_ptr(),
    )


def _segment_structures(segments: Sequence[Segment]) -> ctypes.Array[SegmentStructure]:
    return (SegmentStructure * len(segments))(
        *(SegmentStructure(each.num_elements, each.num_bits) for each in segments)
    )


def _require_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    require_cpu(name, tensor, torch.float32)
    if tensor.shape != shape:
        raise ShapeError(
            f"encode_page: the frame's {name} has shape {list(tensor.shape)}; the layer's format needs {list(shape)}. "
            f"Make the frame for this model and these bits."
        )
