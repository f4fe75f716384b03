"""Operations in C++ for CPU tensors, called through a plain C interface.

Shapes, dtypes and strides are checked here, once, before the call.
"""

import ctypes

import torch
from torch import Tensor

from moe_bitnet.errors import BackendError, ShapeError
from moe_bitnet.kernels.library import load_library
from moe_bitnet.kernels.registry import Backend

LIBRARY_NAME = "libternary.so"
INTERFACE_VERSION = 1


def load_backend() -> Backend:
    """Load the library; an absent one gives a backend without operations that says why."""
    try:
        operations = _Operations(load_library("moe_bitnet.kernels", LIBRARY_NAME, INTERFACE_VERSION))
    except BackendError as error:
        return Backend("cpp", {}, ("cpu",), absent_because=str(error))
    return Backend("cpp", {"quantize_activation": operations.quantize_activation}, ("cpu",))


class _Operations:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._quantize_activation = library.quantize_activation_f32
        self._quantize_activation.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._quantize_activation.restype = None

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Twin of :func:`moe_bitnet.quantization.quantize_activation`, bit for bit for finite input."""
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ShapeError(f"quantize_activation: x has shape {tuple(x.shape)}; rows need at least one feature.")
        rows = x.detach().to(torch.float32).contiguous()
        x_q = torch.empty(x.shape, dtype=torch.int8)
        activation_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._quantize_activation(
            rows.data_ptr(), activation_scale.numel(), x.shape[-1], x_q.data_ptr(), activation_scale.data_ptr()
        )
        return x_q, activation_scale
