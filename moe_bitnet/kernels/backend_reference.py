"""Every operation in plain PyTorch: the specification that the fast backends are tested against.

Ternary products are computed on integers held in float32. That is exact: a sum
of n terms of at most 128 stays below 2^24, where float32 counts every integer,
up to n = 131,071 inputs; larger matrices are refused.
"""

import itertools

import torch
from torch import Tensor

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.registry import Operation
from moe_bitnet.packing import PackedTernary
from moe_bitnet.quantization import quantize_activation

MAX_IN_FEATURES = 2**24 // 128 - 1

DEVICE_TYPES = ("cpu", "cuda")


def ternary_linear(x_q: Tensor, activation_scale: Tensor, weight: PackedTernary) -> Tensor:
    """Multiply int8 rows by one packed ternary matrix.

    Args:
        x_q: int8 ``[num_tokens, in_features]``.
        activation_scale: float32 ``[num_tokens, 1]``.
        weight: packed ``[out_features, in_features]``.
    Returns:
        float32 ``[num_tokens, out_features]``: exact integer sums, rescaled once.
    Raises:
        ShapeError: the inner sizes differ, or are too large for exact sums in float32.
    """
    _check_linear(x_q, weight)
    sums = x_q.float() @ weight.unpack().float().T
    return sums * (activation_scale * weight.weight_scale)


def grouped_ternary_linear(
    x_q: Tensor, activation_scale: Tensor, weight: PackedTernary, expert_offsets: Tensor
) -> Tensor:
    """Multiply rows sorted by expert, each by its expert's packed ternary matrix.

    Args:
        x_q: int8 ``[num_rows, in_features]``, sorted by expert.
        activation_scale: float32 ``[num_rows, 1]``.
        weight: packed ``[num_experts, out_features, in_features]``.
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


def _check_linear(x_q: Tensor, weight: PackedTernary) -> None:
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


OPERATIONS: dict[str, Operation] = {
    "quantize_activation": quantize_activation,
    "ternary_linear": ternary_linear,
    "grouped_ternary_linear": grouped_ternary_linear,
}
