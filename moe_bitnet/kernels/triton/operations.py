"""The operations with the signatures of the reference: checks, plans and launches.

Nothing here waits for the GPU. The values of ``expert_offsets`` are therefore not checked, as they are on the CPU:
damaged ones reach no memory outside the tensors, but leave rows of the output unwritten.

Weights should be tiles. Portable bytes are tiled for each call, which costs far more than the product.
"""

import torch
from torch import Tensor

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.kernels.registry import Operation
from moe_bitnet.kernels.triton.checks import check_experts, expert_bounds, float_rows, int8_rows, tiled
from moe_bitnet.kernels.triton.launches import gate_up, launch_linear, launch_quantize
from moe_bitnet.kernels.triton.plan import Plan
from moe_bitnet.tiles import TernaryMatrix


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`moe_bitnet.quantization.quantize_activation`, bit for bit for finite input."""
    rows = float_rows("quantize_activation", x)
    x_q, activation_scale, _ = launch_quantize(rows, None, 0.0, None, sums_rows=False)
    return x_q, activation_scale


def rms_norm_quantize(x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Twin of :func:`moe_bitnet.kernels.backend_reference.rms_norm_quantize`, with the norm in float32."""
    rows = float_rows("rms_norm_quantize", x)
    gain = norm_weight.detach().to(torch.float32).contiguous()
    if gain.shape != x.shape[-1:] or gain.device != x.device:
        raise ShapeError(
            f"rms_norm_quantize: x has {x.shape[-1]} features on {x.device}, norm_weight has shape {list(gain.shape)} "
            f"on {gain.device}. Give one gain a feature, on the same device."
        )
    x_q, activation_scale, _ = launch_quantize(rows, gain, eps, None, sums_rows=False)
    return x_q, activation_scale


def ternary_linear(x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix, *, plan: Plan | None = None) -> Tensor:
    """Twin of :func:`moe_bitnet.kernels.backend_reference.ternary_linear`, bit for bit.

    Args:
        x_q: int8 ``[num_tokens, in_features]``.
        activation_scale: float32 ``[num_tokens, 1]``.
        weight: ``[out_features, in_features]``.
        plan: how to cut the product; chosen by size unless given.
    """
    matrix = tiled("ternary_linear", weight, x_q.device, num_matrices=1)
    rows, scales = int8_rows("ternary_linear", x_q, activation_scale, matrix.in_features)
    return launch_linear(rows, scales, matrix, None, None, plan)


def grouped_ternary_linear(
    x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix, expert_offsets: Tensor, *, plan: Plan | None = None
) -> Tensor:
    """Twin of :func:`moe_bitnet.kernels.backend_reference.grouped_ternary_linear`, bit for bit, in one or two launches.

    Args:
        x_q: int8 ``[num_rows, in_features]``, sorted by expert.
        activation_scale: float32 ``[num_rows, 1]``.
        weight: ``[num_experts, out_features, in_features]``.
        expert_offsets: int64 ``[num_experts + 1]``; its values stay on the GPU and are not checked.
        plan: how to cut the product; chosen by size unless given.
    """
    offsets = expert_bounds("grouped_ternary_linear", expert_offsets, x_q.device)
    matrix = tiled("grouped_ternary_linear", weight, x_q.device, num_matrices=offsets.numel() - 1)
    rows, scales = int8_rows("grouped_ternary_linear", x_q, activation_scale, matrix.in_features)
    return launch_linear(rows, scales, matrix, offsets, None, plan)


def expert_ffn(
    x_q: Tensor,
    activation_scale: Tensor,
    experts: ExpertWeights,
    expert_offsets: Tensor,
    *,
    gate_up_plan: Plan | None = None,
    down_plan: Plan | None = None,
) -> Tensor:
    """Twin of :func:`moe_bitnet.kernels.backend_reference.expert_ffn`, with norm and sigmoid in float32.

    Args:
        x_q: int8 ``[num_rows, H]``, sorted by expert.
        activation_scale: float32 ``[num_rows, 1]``.
        experts: the layer's experts.
        expert_offsets: int64 ``[num_experts + 1]``; its values stay on the GPU and are not checked.
        gate_up_plan: how to cut the first products; chosen by size unless given.
        down_plan: how to cut the last product; chosen by size unless given.
    """
    num_experts = experts.num_experts
    offsets = expert_bounds("expert_ffn", expert_offsets, x_q.device)
    gate, up, down = (
        tiled("expert_ffn", matrix, x_q.device, num_matrices=num_experts)
        for matrix in (experts.gate, experts.up, experts.down)
    )
    check_experts(experts, gate, up, down, offsets)
    rows, scales = int8_rows("expert_ffn", x_q, activation_scale, gate.in_features)
    inner = gate_up(rows, scales, gate, up, experts.activation == "squared_relu", offsets, gate_up_plan)
    inner_q, inner_scale, sums = normalize_inner(inner, experts.norm_weight, experts.norm_eps, offsets)
    return launch_linear(inner_q, inner_scale, down, offsets, sums, down_plan)


def normalize_inner(inner: Tensor, norm_weight: Tensor, eps: float, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize rows with their expert's gain and quantize them.

    Args:
        inner: float32 ``[num_rows, F]``, sorted by expert.
        norm_weight: ``[num_experts, F]``.
        eps: added to the mean square.
        offsets: int64 ``[num_experts + 1]``.
    Returns:
        int8 ``[num_rows, F]``, float32 ``[num_rows, 1]``, and int32 ``[num_rows]``, the sums of the int8 rows.
    """
    gain = norm_weight.detach().to(torch.float32).contiguous()
    return launch_quantize(inner, gain, eps, offsets, sums_rows=True)


OPERATIONS: dict[str, Operation] = {
    "quantize_activation": quantize_activation,
    "rms_norm_quantize": rms_norm_quantize,
    "ternary_linear": ternary_linear,
    "grouped_ternary_linear": grouped_ternary_linear,
    "expert_ffn": expert_ffn,
}
