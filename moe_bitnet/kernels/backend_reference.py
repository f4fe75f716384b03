"""Every operation in plain PyTorch: the specification that the fast backends are tested against.

Ternary products are computed on integers held in float32. That is exact: a sum
of n terms of at most 128 stays below 2^24, where float32 counts every integer,
up to n = 131,071 inputs; larger matrices are refused.
"""

import itertools

import torch
from torch import Tensor

from moe_bitnet.errors import ShapeError
from moe_bitnet.inference_math import gated_activation, rms_norm
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.kernels.registry import Operation
from moe_bitnet.quantization import quantize_activation
from moe_bitnet.tiles import TernaryMatrix, tile, untile

MAX_IN_FEATURES = 2**24 // 128 - 1

DEVICE_TYPES = ("cpu", "cuda")


def ternary_linear(x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix) -> Tensor:
    """Multiply int8 rows by one packed ternary matrix.

    Args:
        x_q: int8 ``[num_tokens, in_features]``.
        activation_scale: float32 ``[num_tokens, 1]``.
        weight: ``[out_features, in_features]``, portable bytes or tiles.
    Returns:
        float32 ``[num_tokens, out_features]``: exact integer sums, rescaled once.
    Raises:
        ShapeError: the inner sizes differ, or are too large for exact sums in float32.
    """
    _check_linear(x_q, weight)
    sums = x_q.float() @ weight.unpack().float().T
    return sums * (activation_scale * weight.weight_scale)


def grouped_ternary_linear(
    x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix, expert_offsets: Tensor
) -> Tensor:
    """Multiply rows sorted by expert, each by its expert's packed ternary matrix.

    Args:
        x_q: int8 ``[num_rows, in_features]``, sorted by expert.
        activation_scale: float32 ``[num_rows, 1]``.
        weight: ``[num_experts, out_features, in_features]``, portable bytes or tiles.
        expert_offsets: int64 ``[num_experts + 1]``; expert e owns rows ``offsets[e]:offsets[e + 1]``, possibly none.
    Returns:
        float32 ``[num_rows, out_features]``.
    Raises:
        ShapeError: the inner sizes differ, or are too large for exact sums in float32.
    """
    _check_linear(x_q, weight)
    output = x_q.new_empty((x_q.shape[0], weight.out_features), dtype=torch.float32)
    bounds = expert_offsets.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            rows = slice(start, stop)
            output[rows] = ternary_linear(x_q[rows], activation_scale[rows], weight.select(expert))
    return output


def _check_linear(x_q: Tensor, weight: TernaryMatrix) -> None:
    if x_q.shape[-1] != weight.in_features:
        raise ShapeError(
            f"ternary_linear: x has {x_q.shape[-1]} features, the weight was packed for {weight.in_features}. "
            f"Pass x of shape [num_tokens, {weight.in_features}], or pack the weight again."
        )
    if weight.in_features > MAX_IN_FEATURES:
        raise ShapeError(
            f"ternary_linear: {weight.in_features} inputs exceed {MAX_IN_FEATURES}, "
            f"the most that the reference backend sums exactly. Split the matrix along its inputs."
        )


def rms_norm_quantize(x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalize rows and quantize them to int8.

    Args:
        x: ``[num_tokens, features]``, float.
        norm_weight: float32 ``[features]``, gain of the norm.
        eps: added to the mean square.
    Returns:
        ``x_q`` int8 ``[num_tokens, features]`` and ``activation_scale`` float32 ``[num_tokens, 1]``.
    """
    return quantize_activation(rms_norm(x, eps) * norm_weight)


def expert_ffn(x_q: Tensor, activation_scale: Tensor, experts: ExpertWeights, expert_offsets: Tensor) -> Tensor:
    """Run the experts of a layer on rows sorted by expert.

    ``down(quantize(norm(activation(gate(x)) · up(x))))``, each row with its expert's weights.

    Args:
        x_q: int8 ``[num_rows, H]``, sorted by expert.
        activation_scale: float32 ``[num_rows, 1]``.
        experts: the layer's experts.
        expert_offsets: int64 ``[num_experts + 1]``; expert e owns rows ``offsets[e]:offsets[e + 1]``, possibly none.
    Returns:
        float32 ``[num_rows, H]``, unweighted.
    Raises:
        ShapeError: sizes differ.
    """
    gate = grouped_ternary_linear(x_q, activation_scale, experts.gate, expert_offsets)
    up = grouped_ternary_linear(x_q, activation_scale, experts.up, expert_offsets)
    inner = rms_norm(gated_activation(gate, up, experts.activation), experts.norm_eps)
    expert_of_row = torch.repeat_interleave(expert_offsets.diff())  # [num_rows]
    inner_q, inner_scale = quantize_activation(inner * experts.norm_weight[expert_of_row])
    return grouped_ternary_linear(inner_q, inner_scale, experts.down, expert_offsets)


OPERATIONS: dict[str, Operation] = {
    "quantize_activation": quantize_activation,
    "rms_norm_quantize": rms_norm_quantize,
    "expert_ffn": expert_ffn,
    "tile": tile,
    "untile": untile,
    "ternary_linear": ternary_linear,
    "grouped_ternary_linear": grouped_ternary_linear,
}
