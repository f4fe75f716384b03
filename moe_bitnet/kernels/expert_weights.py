"""The weights of one layer's experts, as the fused expert kernel takes them."""

from dataclasses import dataclass

from torch import Tensor

from moe_bitnet.config import Activation
from moe_bitnet.tiles import TernaryMatrix


@dataclass(frozen=True)
class ExpertWeights:
    """Three projections of every expert, and what stands between them.

    Attributes:
        gate: ``[num_experts, F, H]``.
        up: ``[num_experts, F, H]``.
        down: ``[num_experts, H, F]``.
        norm_weight: float32 ``[num_experts, F]``, gain of the norm before ``down``.
        norm_eps: added to the mean square of that norm.
        activation: ``"swiglu"`` or ``"squared_relu"``.
    """

    gate: TernaryMatrix
    up: TernaryMatrix
    down: TernaryMatrix
    norm_weight: Tensor
    norm_eps: float
    activation: Activation

    @property
    def num_experts(self) -> int:
        """How many experts."""
        return self.norm_weight.shape[0]
