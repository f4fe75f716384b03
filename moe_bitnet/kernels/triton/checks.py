"""What the operations accept, checked once in Python before a launch."""

import torch
from torch import Tensor

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.backend_reference import MAX_IN_FEATURES
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import PackedTernary
from moe_bitnet.tiles import TernaryMatrix, TiledTernary, block_bytes, num_row_blocks, tile

KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the quantizers read; others are converted to float32 before."""


def float_rows(operation: str, x: Tensor) -> Tensor:
    """Return rows in a dtype that the kernels read, contiguous.

    Raises:
        ShapeError: rows without features.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"{operation}: x has shape {tuple(x.shape)}; rows need at least one feature.")
    x = x.detach()
    return (x if x.dtype in KERNEL_FLOATS else x.to(torch.float32)).contiguous()


def int8_rows(operation: str, x_q: Tensor, activation_scale: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their float32 scales, contiguous.

    Raises:
        ShapeError: another dtype, other features, or scales that are not one a row on the same device.
    """
    if x_q.dtype != torch.int8 or x_q.dim() != 2 or x_q.shape[-1] != in_features:
        raise ShapeError(
            f"{operation}: x is {x_q.dtype} with {x_q.shape[-1]} features, the weight was packed for {in_features}. "
            f"Pass int8 x of shape [num_tokens, {in_features}], or pack the weight again."
        )
    if activation_scale.numel() != x_q.shape[0] or activation_scale.device != x_q.device:
        raise ShapeError(
            f"{operation}: x has {x_q.shape[0]} rows on {x_q.device}, activation_scale {activation_scale.numel()} on "
            f"{activation_scale.device}. Give one a row, on the same device."
        )
    return x_q.contiguous(), activation_scale.to(torch.float32).contiguous()


def tiled(operation: str, weight: TernaryMatrix, device: torch.device, num_matrices: int) -> TiledTernary:
    """Tile portable bytes, and check that tiles have the bytes that their sizes say.

    Raises:
        ShapeError: they have not, are not one matrix an expert, or not on ``device``; or too many inputs.
    """
    matrix = tile(weight) if isinstance(weight, PackedTernary) else weight
    tiles, scale = matrix.tiles.contiguous(), matrix.weight_scale.to(torch.float32).contiguous()
    expected = num_matrices * num_row_blocks(matrix.out_features) * block_bytes(matrix.in_features, matrix.layout)
    if tiles.numel() != expected or scale.numel() != num_matrices or tiles.dtype != torch.uint8:
        raise ShapeError(
            f"{operation}: the weight holds {tiles.numel()} bytes ({tiles.dtype}) and {scale.numel()} scales; "
            f"{num_matrices} matrices of {matrix.out_features} x {matrix.in_features} in layout {matrix.layout} take "
            f"{expected} bytes of uint8. Give one matrix an expert, or tile the weight again."
        )
    if tiles.device != device or scale.device != device:
        raise ShapeError(f"{operation}: x is on {device} and the weight on {tiles.device}. Move one to the other.")
    if matrix.in_features > MAX_IN_FEATURES:
        raise ShapeError(
            f"{operation}: {matrix.in_features} inputs exceed {MAX_IN_FEATURES}, "
            f"the most that are summed exactly. Split the matrix along its inputs."
        )
    return TiledTernary(tiles, scale, matrix.out_features, matrix.in_features, matrix.layout)


def expert_bounds(operation: str, expert_offsets: Tensor, device: torch.device) -> Tensor:
    """Return expert offsets as int64, contiguous; their values are not checked.

    Raises:
        ShapeError: not a vector of two or more numbers on ``device``.
    """
    if expert_offsets.dim() != 1 or expert_offsets.numel() < 2 or expert_offsets.device != device:
        raise ShapeError(
            f"{operation}: expert_offsets has shape {list(expert_offsets.shape)} on {expert_offsets.device}. "
            f"Give num_experts + 1 numbers on {device}."
        )
    return expert_offsets.to(torch.int64).contiguous()


def check_experts(
    experts: ExpertWeights, gate: TiledTernary, up: TiledTernary, down: TiledTernary, offsets: Tensor
) -> None:
    """Check that the matrices of a layer follow each other.

    Raises:
        ShapeError: they do not, or experts, norms and offsets are not as many.
    """
    inner = (experts.norm_weight.shape[-1], gate.in_features)
    sizes = [(matrix.out_features, matrix.in_features) for matrix in (gate, up, down)]
    if sizes[:2] != [inner, inner] or down.in_features != inner[0] or gate.layout != up.layout:
        raise ShapeError(
            f"expert_ffn: gate, up and down are {sizes} (outputs, inputs) with a norm of {inner[0]}, in layouts "
            f"{gate.layout}, {up.layout} and {down.layout}; give matrices that follow each other, gate and up in one "
            f"layout."
        )
    if offsets.numel() != experts.num_experts + 1 or experts.norm_weight.device != offsets.device:
        raise ShapeError(
            f"expert_ffn: {offsets.numel()} expert_offsets on {offsets.device} for {experts.num_experts} norms on "
            f"{experts.norm_weight.device}; give one more than experts, on the same device."
        )
