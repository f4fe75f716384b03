"""Linear layers of attention: ternary in training, ternary packed for inference, and float for the twin.

All three take float rows and return float32 rows, have no bias, and may hold an
RMSNorm of their input (``has_norm``): inside every layer in the recipe of the
b1.58 FAQ, and before the output projection in both recipes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bitnet.config import ModelConfig, StraightThrough
from moe_bitnet.kernels import select
from moe_bitnet.layers import RMSNorm
from moe_bitnet.packed_module import MatrixSizes, PackedModule
from moe_bitnet.packing import Layout, pack
from moe_bitnet.quantization import (
    WeightLevels,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
)


class FloatLinear(nn.Module):
    """A plain linear layer with an optional norm: what BitLinear is compared with.

    Args:
        in_features: inputs.
        out_features: outputs.
        norm_eps: if given, the input passes an RMSNorm with this epsilon.
    """

    def __init__(self, in_features: int, out_features: int, norm_eps: float | None = None) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm_eps is None else RMSNorm(in_features, norm_eps)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``[..., in_features]``; returns float32 ``[..., out_features]``."""
        return F.linear(self.norm(x).float(), self.weight.float()).float()


class BitLinear(FloatLinear):
    """A linear layer that computes with ternary weights and int8 activations, for training.

    The latent ``weight`` stays in float; each forward pass quantizes it anew and
    gradients pass the rounding unchanged.

    Args:
        in_features: inputs.
        out_features: outputs.
        norm_eps: if given, the input passes an RMSNorm with this epsilon.
        levels: ``"ternary"`` or ``"binary"`` weights.
        straight_through: which gradient passes the rounding of activations.

    Source: arXiv:2402.17764, section 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        norm_eps: float | None = None,
        levels: WeightLevels = "ternary",
        straight_through: StraightThrough = "identity",
    ) -> None:
        super().__init__(in_features, out_features, norm_eps)
        self.levels: WeightLevels = levels
        self.straight_through: StraightThrough = straight_through

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``[..., in_features]``; returns float32 ``[..., out_features]``."""
        x_q, activation_scale = fake_quantize_activation(self.norm(x), self.straight_through)
        weight_q, weight_scale = fake_quantize_weight(self.weight, self.levels)
        # Integers up to 127 are exact in bfloat16 too; only the sums are rounded there.
        return F.linear(x_q, weight_q).float() * (activation_scale * weight_scale.squeeze(0))


class PackedBitLinear(PackedModule):
    """BitLinear for inference: packed weights, true int8 activations, the same integers.

    Args:
        in_features: inputs.
        out_features: outputs.
        layout: how weights are packed.
        norm_eps: if given, the input passes an RMSNorm with this epsilon.
    """

    def __init__(self, in_features: int, out_features: int, layout: Layout, norm_eps: float | None = None) -> None:
        super().__init__()
        self.in_features = in_features
        self.norm = nn.Identity() if norm_eps is None else RMSNorm(in_features, norm_eps)
        self.hold_matrices({"weight": MatrixSizes(out_features, in_features)}, layout)

    @classmethod
    def from_bitlinear(cls, linear: BitLinear, layout: Layout) -> "PackedBitLinear":
        """Quantize and pack a trained layer."""
        out_features, in_features = linear.weight.shape
        norm = linear.norm
        packed = cls(in_features, out_features, layout, norm.eps if isinstance(norm, RMSNorm) else None)
        packed.norm.load_state_dict(norm.state_dict())
        weight_ternary, weight_scale = quantize_weight(linear.weight.detach(), linear.levels)
        packed.set_matrix("weight", pack(weight_ternary, layout), weight_scale)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` ``[..., in_features]``; returns float32 ``[..., out_features]``."""
        rows, device_type = x.reshape(-1, self.in_features), x.device.type
        if isinstance(self.norm, RMSNorm):
            x_q, activation_scale = select("rms_norm_quantize", device_type)(rows, self.norm.weight, self.norm.eps)
        else:
            x_q, activation_scale = select("quantize_activation", device_type)(rows)
        output: Tensor = select("ternary_linear", device_type)(x_q, activation_scale, self.matrix("weight"))
        return output.view(*x.shape[:-1], output.shape[-1])


def build_linear(
    config: ModelConfig, in_features: int, out_features: int, norm_eps: float | None = None
) -> FloatLinear:
    """Make a projection of attention as ``config.precision`` asks for, with fresh weights."""
    if config.has_float_attention:
        return FloatLinear(in_features, out_features, norm_eps)
    return BitLinear(in_features, out_features, norm_eps, weight_levels(config), config.straight_through)


def weight_levels(config: ModelConfig) -> WeightLevels:
    """Return the values that packable weights of ``config`` take."""
    return "binary" if config.precision == "binary" else "ternary"
