"""BitNet b1.58 quantizers: pure functions on tensors, the definition that every kernel is tested against.

A float tensor enters, integers and the scale that multiplies them leave::

    weight  [.., out, in]  ──absmean──►  weight_ternary in {-1, 0, 1},  weight_scale  [.., 1, 1]
    x       [.., in]       ──absmax───►  x_q in [-128, 127],            activation_scale [.., 1]

    y = (x_q · weight_ternaryᵀ) · (activation_scale · weight_scale)

The ``fake_`` twins return the same integers *as floats* and let gradients through
unchanged (straight-through), so training computes exactly what inference will.

Source: Ma et al. 2024, arXiv:2402.17764, section 2; "The Era of 1-bit LLMs: Training Tips, Code and FAQ", March 2024.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe_bitnet.errors import ShapeError

MIN_SCALE = 1e-5
"""Smallest mean |weight| and smallest max |activation|: rows of zeros keep a finite scale."""

INT8_MAX = 127


def weight_absmean(weight: Tensor) -> Tensor:
    """Return the scale of each weight matrix: the mean of its absolute values.

    Args:
        weight: ``[..., out_features, in_features]``, float; leading sizes are separate matrices (experts).
    Returns:
        ``[..., 1, 1]`` float32, at least ``MIN_SCALE``.
    """
    return weight.float().abs().mean(dim=(-2, -1), keepdim=True).clamp_min(MIN_SCALE)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each weight matrix to {-1, 0, 1} times its mean absolute value.

    Args:
        weight: ``[..., out_features, in_features]``, float.
    Returns:
        ``weight_ternary`` int8 of the same shape, and ``weight_scale`` ``[..., 1, 1]`` float32.
    """
    weight_scale = weight_absmean(weight)
    return (weight.float() / weight_scale).round().clamp(-1, 1).to(torch.int8), weight_scale


def activation_absmax(x: Tensor) -> Tensor:
    """Return the int8 scale of each row: its largest absolute value over 127.

    Args:
        x: ``[..., in_features]``, float.
    Returns:
        ``[..., 1]`` float32, at least ``MIN_SCALE / 127``.
    """
    return x.float().abs().amax(dim=-1, keepdim=True).clamp_min(MIN_SCALE) / INT8_MAX


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row (token) to int8 by its largest absolute value.

    Args:
        x: ``[..., in_features]``, float.
    Returns:
        ``x_q`` int8 of the same shape, and ``activation_scale`` ``[..., 1]`` float32.
    Raises:
        ShapeError: rows without features.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"quantize_activation: x has shape {tuple(x.shape)}; rows need at least one feature.")
    activation_scale = activation_absmax(x)
    return (x.float() / activation_scale).round().clamp(-128, INT8_MAX).to(torch.int8), activation_scale


def fake_quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Like :func:`quantize_weight`, as floats with straight-through gradients.

    Returns:
        integers in {-1, 0, 1} in float32 that pass the gradient of ``weight / weight_scale``,
        and the scale, through which no gradient flows.
    """
    weight_scale = weight_absmean(weight.detach())
    return _round_clamp(weight.float() / weight_scale, -1, 1), weight_scale


def fake_quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Like :func:`quantize_activation`, as floats with straight-through gradients.

    Returns:
        integers in [-128, 127] in float32 that pass the gradient of ``x / activation_scale``,
        and the scale, through which no gradient flows.
    """
    activation_scale = activation_absmax(x.detach())
    return _round_clamp(x.float() / activation_scale, -128, INT8_MAX), activation_scale


class _RoundClamp(torch.autograd.Function):
    """Round half to even and clamp; the gradient passes unchanged (straight-through)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, low: int, high: int) -> Tensor:
        return x.round().clamp(low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0], None, None


def _round_clamp(x: Tensor, low: int, high: int) -> Tensor:
    rounded: Tensor = _RoundClamp.apply(x, low, high)  # type: ignore[no-untyped-call]
    return rounded
