"""BitNet b1.58 quantizers: pure functions on tensors, the definition that every kernel is tested against.

A float tensor enters, integers and the scale that multiplies them leave::

    weight  [.., out, in]  ──absmean──►  weight_ternary in {-1, 0, 1},  weight_scale  [.., 1, 1]
    x       [.., in]       ──absmax───►  x_q in [-128, 127],            activation_scale [.., 1]

    y = (x_q · weight_ternaryᵀ) · (activation_scale · weight_scale)

The ``fake_`` twins return the same integers *as floats* and let gradients through
unchanged (straight-through), so training computes exactly what inference will.

Source: Ma et al. 2024, arXiv:2402.17764, section 2; "The Era of 1-bit LLMs: Training Tips, Code and FAQ", March 2024.
Binary weights: Wang et al. 2023, arXiv:2310.11453, section 2.1.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe_bitnet.config import StraightThrough
from moe_bitnet.errors import ShapeError

WeightLevels = Literal["ternary", "binary"]

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


def quantize_weight(weight: Tensor, levels: WeightLevels = "ternary") -> tuple[Tensor, Tensor]:
    """Round each weight matrix to {-1, 0, 1}, or {-1, 1}, times its mean absolute value.

    Args:
        weight: ``[..., out_features, in_features]``, float.
        levels: ``"ternary"``, or ``"binary"``: 1 above the matrix's mean, else -1.
    Returns:
        ``weight_ternary`` int8 of the same shape, and ``weight_scale`` ``[..., 1, 1]`` float32.
    """
    weight_scale = weight_absmean(weight)
    if levels == "binary":
        return _binarize(weight.float()).to(torch.int8), weight_scale
    return (weight.float() / weight_scale).round().clamp(-1, 1).to(torch.int8), weight_scale


def _binarize(weight: Tensor) -> Tensor:
    return torch.where(weight > weight.mean(dim=(-2, -1), keepdim=True), 1.0, -1.0)


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


def fake_quantize_weight(weight: Tensor, levels: WeightLevels = "ternary") -> tuple[Tensor, Tensor]:
    """Like :func:`quantize_weight`, as floats with straight-through gradients.

    Returns:
        integers in {-1, 0, 1} in float32 that pass the gradient of ``weight / weight_scale``,
        and the scale, through which no gradient flows.
    """
    weight_scale = weight_absmean(weight.detach())
    scaled = weight.float() / weight_scale
    if levels == "binary":
        return _pass_through(_binarize(weight.detach().float()), scaled), weight_scale
    return _round_clamp(scaled, -1, 1), weight_scale


def fake_quantize_activation(x: Tensor, straight_through: StraightThrough = "identity") -> tuple[Tensor, Tensor]:
    """Like :func:`quantize_activation`, as floats with straight-through gradients.

    Args:
        x: ``[..., in_features]``, float.
        straight_through: ``"identity"`` passes every gradient, ``"clipped"`` none where a row's values are at the
            ends of the int8 range, ``"relu"`` those of positive values alone.
    Returns:
        integers in [-128, 127] in float32 that pass the gradient of ``x / activation_scale``,
        and the scale, through which no gradient flows.
    Source: the three estimators of Yin et al. 2019, arXiv:1903.05662, for activations with a sign.
    """
    activation_scale = activation_absmax(x.detach())
    scaled = x.float() / activation_scale
    if straight_through != "identity":
        value = scaled.detach()
        passes = value > 0 if straight_through == "relu" else value.abs() < INT8_MAX
        scaled = torch.where(passes, scaled, value)
    return _round_clamp(scaled, -128, INT8_MAX), activation_scale


INT4_GROUP_SIZE = 32
"""Weights of a row that share one scale: 4 bits and a 16-bit scale for 32 are 4.5 bits a weight."""

INT4_MAX = 7


def fake_quantize_int4(weight: Tensor) -> Tensor:
    """Round groups of a row's weights to 4 bits, as floats with straight-through gradients.

    Args:
        weight: ``[..., out_features, in_features]``, float.
    Returns:
        float32 of the same shape: integers in [-7, 7] times the group's largest absolute value over 7 (held in
        float16), for :data:`INT4_GROUP_SIZE` neighbours in a row; the gradient of ``weight`` passes unchanged.
    """
    values = weight.detach().float()
    padding = -values.shape[-1] % INT4_GROUP_SIZE
    padded = torch.nn.functional.pad(values, (0, padding))
    groups = padded.view(*padded.shape[:-1], -1, INT4_GROUP_SIZE)
    scale = (groups.abs().amax(dim=-1, keepdim=True).clamp_min(MIN_SCALE) / INT4_MAX).half().float()
    rounded = ((groups / scale).round().clamp(-INT4_MAX, INT4_MAX) * scale).flatten(-2)
    return _pass_through(rounded[..., : values.shape[-1]], weight.float())


class _RoundClamp(torch.autograd.Function):
    """Round half to even and clamp; the gradient passes unchanged (straight-through)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, low: int, high: int) -> Tensor:
        return x.round().clamp(low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0], None, None


class _PassThrough(torch.autograd.Function):
    """Return the first tensor; its gradient goes to the second, unchanged (straight-through)."""

    @staticmethod
    def forward(ctx: FunctionCtx, quantized: Tensor, x: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]


def _pass_through(quantized: Tensor, x: Tensor) -> Tensor:
    passed: Tensor = _PassThrough.apply(quantized, x)  # type: ignore[no-untyped-call]
    return passed


def _round_clamp(x: Tensor, low: int, high: int) -> Tensor:
    rounded: Tensor = _RoundClamp.apply(x, low, high)  # type: ignore[no-untyped-call]
    return rounded
