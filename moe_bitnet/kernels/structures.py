"""The structures of the C interface (``csrc/ternary.h``), filled from tensors.

A structure holds bare pointers: whoever makes one keeps the tensors alive while it is used.
"""

import ctypes

import torch
from torch import Tensor

from moe_bitnet.config import Activation
from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.backend_reference import MAX_IN_FEATURES
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import Layout, PackedTernary
from moe_bitnet.tiles import TernaryMatrix, TiledTernary, block_bytes, num_row_blocks

LAYOUT_CODES: dict[Layout, int] = {"2bit": 0, "base3": 1}
ACTIVATION_CODES: dict[Activation, int] = {"swiglu": 0, "squared_relu": 1}


class MatricesStructure(ctypes.Structure):
    """``ternary_matrices``: matrices of one shape in tiles."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_matrices", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("layout", ctypes.c_int32),
    )


class ExpertsStructure(ctypes.Structure):
    """``ternary_experts``: the experts of one layer."""

    _fields_ = (
        ("gate", MatricesStructure),
        ("up", MatricesStructure),
        ("down", MatricesStructure),
        ("norm_weight", ctypes.c_void_p),
        ("norm_eps", ctypes.c_double),
        ("activation", ctypes.c_int32),
    )


def require_cpu(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Check that a pointer to the tensor's memory means what the library takes it for.

    Raises:
        ShapeError: another dtype or device, or not contiguous.
    """
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ShapeError(
            f"{name} is {tensor.dtype} on {tensor.device} (contiguous: {tensor.is_contiguous()}); "
            f"give {dtype}, contiguous, on the CPU."
        )


def matrices_structure(weight: TiledTernary) -> MatricesStructure:
    """Describe tiles, after checking that their bytes are as many as their sizes say.

    Raises:
        ShapeError: sizes that do not fit together, or too many inputs for exact sums.
    """
    num_matrices = weight.weight_scale.numel()
    size = block_bytes(weight.in_features, weight.layout)
    expected = num_matrices * num_row_blocks(weight.out_features) * size
    require_cpu("tiles", weight.tiles, torch.uint8)
    require_cpu("weight_scale", weight.weight_scale, torch.float32)
    if weight.tiles.numel() != expected or weight.in_features < 1 or weight.out_features < 1:
        raise ShapeError(
            f"tiles hold {weight.tiles.numel()} bytes; {num_matrices} matrices of {weight.out_features} x "
            f"{weight.in_features} in layout {weight.layout} take {expected}. Tile the weight again."
        )
    if weight.in_features > MAX_IN_FEATURES:
        raise ShapeError(
            f"ternary_linear: {weight.in_features} inputs exceed {MAX_IN_FEATURES}, "
            f"the most that are summed exactly. Split the matrix along its inputs."
        )
    return MatricesStructure(
        weight.tiles.data_ptr(),
        weight.weight_scale.data_ptr(),
        num_matrices,
        weight.out_features,
        weight.in_features,
        LAYOUT_CODES[weight.layout],
    )


def experts_structure(experts: ExpertWeights) -> ExpertsStructure:
    """Describe the experts of a layer; their matrices must be tiles.

    Raises:
        ShapeError: sizes that do not fit together.
    """
    gate, up, down = (_require_tiles(matrix) for matrix in (experts.gate, experts.up, experts.down))
    if experts.norm_weight.dim() != 2:
        raise ShapeError(
            f"expert_ffn: norm_weight has shape {list(experts.norm_weight.shape)}; give [num_experts, F], one gain a "
            f"feature of every expert."
        )
    num_experts, inner_size = experts.norm_weight.shape
    sizes = [(m.weight_scale.numel(), m.out_features, m.in_features) for m in (gate, up, down)]
    inner = (num_experts, inner_size, gate.in_features)
    if sizes != [inner, inner, (num_experts, down.out_features, inner_size)] or gate.layout != up.layout:
        raise ShapeError(
            f"expert_ffn: gate, up and down are {sizes} (experts, outputs, inputs) with a norm of "
            f"{num_experts} x {inner_size}; give matrices of the same experts that follow each other."
        )
    require_cpu("norm_weight", experts.norm_weight, torch.float32)
    return ExpertsStructure(
        matrices_structure(gate),
        matrices_structure(up),
        matrices_structure(down),
        experts.norm_weight.data_ptr(),
        experts.norm_eps,
        ACTIVATION_CODES[experts.activation],
    )


def _require_tiles(matrix: TernaryMatrix) -> TiledTernary:
    if isinstance(matrix, PackedTernary):
        raise ShapeError("expert_ffn: the weights are portable bytes; tile them first with the operation 'tile'.")
    return matrix
