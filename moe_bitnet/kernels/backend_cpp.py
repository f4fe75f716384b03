"""Operations in C++ for CPU tensors, called through a plain C interface.

Shapes, dtypes and strides are checked here, once, before the call. Signatures and meaning are those of
:mod:`moe_bitnet.kernels.backend_reference`. Weights are best given as tiles; portable bytes are tiled for each
call, which costs far more than the product of a few rows.

The library uses the threads that torch uses (``torch.get_num_threads()``), in a pool of its own, and the best
instruction set of the machine; ``MOE_BITNET_ISA=scalar`` (or ``avx2``, ``avx512``) names another.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_bitnet.errors import BackendError, CheckpointError, ShapeError
from moe_bitnet.kernels.decoder_structures import DECODER_SIGNATURES
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.kernels.library import load_library
from moe_bitnet.kernels.registry import Backend
from moe_bitnet.kernels.structures import (
    LAYOUT_CODES,
    ExpertsStructure,
    MatricesStructure,
    experts_structure,
    matrices_structure,
)
from moe_bitnet.packing import PackedTernary, packed_width
from moe_bitnet.tiles import TernaryMatrix, TiledTernary, block_bytes, num_row_blocks

LIBRARY_NAME = "libternary.so"
INTERFACE_VERSION = 4
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
ISA_VARIABLE = "MOE_BITNET_ISA"

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ternary_isa": (_INT32, ()),
    "ternary_select_isa": (_INT32, (_INT32,)),
    "ternary_tile": (_INT64, (_POINTER, _INT64, _INT64, _INT64, _INT32, _POINTER, _INT32)),
    "ternary_untile": (None, (_POINTER, _INT64, _INT64, _INT64, _INT32, _POINTER, _INT32)),
    "ternary_quantize": (None, (_POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT32)),
    "ternary_rms_norm_quantize": (
        _INT32,
        (_POINTER, _POINTER, ctypes.c_double, _INT64, _INT64, _POINTER, _POINTER, _INT32),
    ),
    "ternary_grouped_linear": (
        _INT32,
        (_POINTER, _POINTER, ctypes.POINTER(MatricesStructure), _POINTER, _POINTER, _INT32),
    ),
    "ternary_expert_ffn": (
        _INT32,
        (_POINTER, _POINTER, ctypes.POINTER(ExpertsStructure), _POINTER, _POINTER, _INT32),
    ),
    "ternary_probe_read": (ctypes.c_double, (_POINTER, _INT64, _INT32)),
    "ternary_probe_peak": (ctypes.c_double, (_INT64, ctypes.POINTER(_INT64), _INT32)),
}


def load_backend() -> Backend:
    """Load the library; an absent one gives a backend without operations that says why."""
    try:
        operations = _Operations(load_kernel_library())
    except BackendError as error:
        return Backend("cpp", {}, ("cpu",), absent_because=str(error))
    return Backend(
        "cpp",
        {
            "quantize_activation": operations.quantize_activation,
            "rms_norm_quantize": operations.rms_norm_quantize,
            "ternary_linear": operations.ternary_linear,
            "grouped_ternary_linear": operations.grouped_ternary_linear,
            "expert_ffn": operations.expert_ffn,
            "tile": operations.tile,
            "untile": operations.untile,
        },
        ("cpu",),
    )


def load_kernel_library() -> ctypes.CDLL:
    """Load the library with the types of its functions declared.

    Raises:
        BackendError: it is absent or of another version, or ``MOE_BITNET_ISA`` names what this machine lacks.
    """
    library = load_library("moe_bitnet.kernels", LIBRARY_NAME, INTERFACE_VERSION)
    for name, (result, arguments) in (_SIGNATURES | DECODER_SIGNATURES).items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.ternary_isa() < 0:
        raise BackendError(
            f"{ISA_VARIABLE} is {os.environ.get(ISA_VARIABLE)!r}, which is unknown or not supported by this machine. "
            f"Allowed are {', '.join(INSTRUCTION_SETS)}; unset it for the best."
        )
    return library


def instruction_set() -> str:
    """Return the name of the instruction set in use.

    Raises:
        BackendError: the library is absent.
    """
    return INSTRUCTION_SETS[load_kernel_library().ternary_isa()]


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Compute with another instruction set inside the block, in the whole process; for tests and benchmarks.

    Raises:
        BackendError: this machine does not have it.
    """
    library = load_kernel_library()
    before = library.ternary_isa()
    if name not in INSTRUCTION_SETS or library.ternary_select_isa(INSTRUCTION_SETS.index(name)) < 0:
        raise BackendError(f"instruction set {name!r} is not supported by this machine.")
    try:
        yield
    finally:
        library.ternary_select_isa(before)


class _Operations:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Twin of :func:`moe_bitnet.quantization.quantize_activation`, bit for bit for finite input."""
        rows = _float_rows("quantize_activation", x)
        x_q, activation_scale = _empty_rows(x)
        self._library.ternary_quantize(
            rows.data_ptr(),
            activation_scale.numel(),
            x.shape[-1],
            x_q.data_ptr(),
            activation_scale.data_ptr(),
            torch.get_num_threads(),
        )
        return x_q, activation_scale

    def rms_norm_quantize(self, x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Twin of :func:`moe_bitnet.kernels.backend_reference.rms_norm_quantize`."""
        rows = _float_rows("rms_norm_quantize", x)
        gain = norm_weight.detach().to(torch.float32).contiguous()
        if gain.shape != x.shape[-1:]:
            raise ShapeError(
                f"rms_norm_quantize: x has {x.shape[-1]} features, norm_weight has shape {list(gain.shape)}. "
                f"Give one gain a feature."
            )
        x_q, activation_scale = _empty_rows(x)
        status = self._library.ternary_rms_norm_quantize(
            rows.data_ptr(),
            gain.data_ptr(),
            eps,
            activation_scale.numel(),
            x.shape[-1],
            x_q.data_ptr(),
            activation_scale.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory("rms_norm_quantize", status)
        return x_q, activation_scale

    def ternary_linear(self, x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix) -> Tensor:
        """Twin of :func:`moe_bitnet.kernels.backend_reference.ternary_linear`, bit for bit."""
        offsets = torch.tensor([0, x_q.shape[0]])
        return self.grouped_ternary_linear(x_q, activation_scale, weight, offsets)

    def grouped_ternary_linear(
        self, x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix, expert_offsets: Tensor
    ) -> Tensor:
        """Twin of :func:`moe_bitnet.kernels.backend_reference.grouped_ternary_linear`, bit for bit."""
        tiled = self._tiled(weight)
        structure = matrices_structure(tiled)
        rows, scales = _int8_rows("ternary_linear", x_q, activation_scale, tiled.in_features)
        offsets = _checked_offsets("ternary_linear", expert_offsets, structure.num_matrices, rows.shape[0])
        output = torch.empty((rows.shape[0], tiled.out_features), dtype=torch.float32)
        status = self._library.ternary_grouped_linear(
            rows.data_ptr(),
            scales.data_ptr(),
            ctypes.byref(structure),
            offsets.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory("ternary_linear", status)
        return output

    def expert_ffn(
        self, x_q: Tensor, activation_scale: Tensor, experts: ExpertWeights, expert_offsets: Tensor
    ) -> Tensor:
        """Twin of :func:`moe_bitnet.kernels.backend_reference.expert_ffn`."""
        gate, up, down = (self._tiled(matrix) for matrix in (experts.gate, experts.up, experts.down))
        norm_weight = experts.norm_weight.detach().to(torch.float32).contiguous()
        tiled = ExpertWeights(gate, up, down, norm_weight, experts.norm_eps, experts.activation)
        structure = experts_structure(tiled)
        rows, scales = _int8_rows("expert_ffn", x_q, activation_scale, gate.in_features)
        offsets = _checked_offsets("expert_ffn", expert_offsets, experts.num_experts, rows.shape[0])
        output = torch.empty((rows.shape[0], down.out_features), dtype=torch.float32)
        status = self._library.ternary_expert_ffn(
            rows.data_ptr(),
            scales.data_ptr(),
            ctypes.byref(structure),
            offsets.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory("expert_ffn", status)
        return output

    def tile(self, packed: PackedTernary) -> TiledTernary:
        """Twin of :func:`moe_bitnet.tiles.tile`, bit for bit.

        Raises:
            ShapeError: rows of the wrong width.
            CheckpointError: a byte that encodes no weights.
        """
        weight_packed = packed.weight_packed.contiguous()
        width = packed_width(packed.in_features, packed.layout)
        if weight_packed.dtype != torch.uint8 or weight_packed.shape[-1] != width:
            raise ShapeError(
                f"tile: packed weights are {weight_packed.dtype} with rows of {weight_packed.shape[-1]} bytes; "
                f"{packed.in_features} inputs in layout {packed.layout} need uint8 rows of {width} bytes."
            )
        leading = weight_packed.shape[:-2]
        blocks, size = num_row_blocks(packed.out_features), block_bytes(packed.in_features, packed.layout)
        tiles = torch.empty((*leading, blocks, size), dtype=torch.uint8)
        num_invalid = self._library.ternary_tile(
            weight_packed.data_ptr(),
            leading.numel(),
            packed.out_features,
            packed.in_features,
            LAYOUT_CODES[packed.layout],
            tiles.data_ptr(),
            torch.get_num_threads(),
        )
        if num_invalid:
            raise CheckpointError(
                f"tile: {num_invalid} bytes encode no ternary weights in layout {packed.layout}. "
                f"The weights are damaged; pack the model again."
            )
        scale = packed.weight_scale.to(torch.float32).contiguous()
        return TiledTernary(tiles, scale, packed.out_features, packed.in_features, packed.layout)

    def untile(self, tiled: TiledTernary) -> PackedTernary:
        """Twin of :func:`moe_bitnet.tiles.untile`, bit for bit."""
        structure = matrices_structure(tiled)
        width = packed_width(tiled.in_features, tiled.layout)
        weight_packed = torch.empty((*tiled.tiles.shape[:-2], tiled.out_features, width), dtype=torch.uint8)
        self._library.ternary_untile(
            tiled.tiles.data_ptr(),
            structure.num_matrices,
            tiled.out_features,
            tiled.in_features,
            structure.layout,
            weight_packed.data_ptr(),
            torch.get_num_threads(),
        )
        return PackedTernary(weight_packed, tiled.weight_scale, tiled.in_features, tiled.layout)

    def _tiled(self, weight: TernaryMatrix) -> TiledTernary:
        return self.tile(weight) if isinstance(weight, PackedTernary) else weight


def _require_memory(operation: str, status: int) -> None:
    if status:
        raise BackendError(f"{operation}: no memory for scratch. Give fewer rows at a time.")


def _float_rows(operation: str, x: Tensor) -> Tensor:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"{operation}: x has shape {tuple(x.shape)}; rows need at least one feature.")
    return x.detach().to(torch.float32).contiguous()


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)


def _int8_rows(operation: str, x_q: Tensor, activation_scale: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    if x_q.dtype != torch.int8 or x_q.dim() != 2 or x_q.shape[-1] != in_features:
        raise ShapeError(
            f"{operation}: x is {x_q.dtype} with {x_q.shape[-1]} features, the weight was packed for {in_features}. "
            f"Pass int8 x of shape [num_tokens, {in_features}], or pack the weight again."
        )
    if activation_scale.numel() != x_q.shape[0]:
        raise ShapeError(
            f"{operation}: x has {x_q.shape[0]} rows and activation_scale {activation_scale.numel()}. Give one a row."
        )
    return x_q.contiguous(), activation_scale.to(torch.float32).contiguous()


def _checked_offsets(operation: str, expert_offsets: Tensor, num_experts: int, num_rows: int) -> Tensor:
    offsets = expert_offsets.to(torch.int64).contiguous()
    bounds = offsets.tolist()
    if len(bounds) != num_experts + 1 or bounds[0] != 0 or bounds[-1] != num_rows or bounds != sorted(bounds):
        raise ShapeError(
            f"{operation}: expert_offsets {bounds[:8]} do not cut {num_rows} rows for {num_experts} experts. "
            f"Give num_experts + 1 ascending numbers from 0 to {num_rows}."
        )
    return offsets
