"""The experts of one layer, all computed together on rows sorted by expert.

::

    x [n, H] ──gate, up──► activation(gate) · up [n, F] ──norm──► down ──► [n, H]

The input is quantized once for each token, before it is copied to its experts:
that is why a row can travel to another device as int8 without changing a bit.

:class:`ExpertExecutor` is the seam: a layer calls ``run`` and does not know
whether its experts are here (this file) or on other devices (``cluster``).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bitnet import inference_math
from moe_bitnet.bitlinear import weight_levels
from moe_bitnet.config import Activation, ModelConfig
from moe_bitnet.dispatch import combine, sort_by_expert
from moe_bitnet.kernels import select
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.layers import rms_norm
from moe_bitnet.packed_module import MatrixSizes, PackedModule
from moe_bitnet.packing import Layout, pack
from moe_bitnet.quantization import (
    fake_quantize_activation,
    fake_quantize_int4,
    fake_quantize_weight,
    quantize_weight,
)
from moe_bitnet.router import Routing

PROJECTIONS = ("gate", "up", "down")


class ExpertExecutor(Protocol):
    """Runs the experts of one layer, wherever they are."""

    def run(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: float ``[T, H]``, normalized.
            routing: the experts of each token.
        Returns:
            float32 ``[T, H]``.
        """
        ...


@dataclass(frozen=True)
class ExpertInput:
    """Rows as the experts take them, and as they travel.

    Attributes:
        rows: ``[n, H]``; int8 (or integers held in float) for ternary experts, else float.
        activation_scale: float32 ``[n, 1]`` for ternary experts, else ``None``.
    """

    rows: Tensor
    activation_scale: Tensor | None

    def take(self, indices: Tensor) -> "ExpertInput":
        """Return the rows at ``indices`` (int64 ``[m]``); on a CPU this has a faster gradient than ``[indices]``."""
        scale = None if self.activation_scale is None else self.activation_scale.index_select(0, indices)
        return ExpertInput(self.rows.index_select(0, indices), scale)


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return ``silu(gate) · up`` (SwiGLU, arXiv:2002.05202) or ``relu(gate)² · up`` (2B4T)."""
    if not torch.is_grad_enabled():
        return inference_math.gated_activation(gate, up, activation)
    if activation == "squared_relu":
        return F.relu(gate).square() * up
    return F.silu(gate) * up


class GroupedExperts(nn.Module):
    """What all kinds of experts share: the walk from tokens to rows and back.

    Args:
        config: sizes and recipe.
        num_experts: experts held here; a host holds fewer than the layer has.
        is_shared: these are the layer's shared experts, which have their own width.
    """

    training_row_alignment = 1

    def __init__(self, config: ModelConfig, num_experts: int, is_shared: bool = False) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.is_shared = is_shared
        self.activation: Activation = config.activation
        self.norm_eps = config.norm_eps
        self.straight_through = config.straight_through
        self.levels = weight_levels(config)
        width = config.shared_intermediate_size if is_shared else config.intermediate_size
        self.sizes = {  # projection → (out_features, in_features)
            "gate": (width, config.hidden_size),
            "up": (width, config.hidden_size),
            "down": (config.hidden_size, width),
        }
        self.has_norm = not (is_shared and config.has_float_backbone)
        if self.has_norm:
            self.norm_weight = nn.Parameter(torch.ones(num_experts, width))

    def run(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Fulfil :class:`ExpertExecutor` with the experts held here."""
        row_alignment = self.training_row_alignment if torch.is_grad_enabled() else 1
        dispatch = sort_by_expert(routing.expert_indices, self.num_experts, row_alignment)
        rows = self.prepare(hidden_states).take(dispatch.sorted_token_indices)
        outputs = self.compute(rows, dispatch.expert_offsets)
        return combine(outputs, dispatch.slot_positions, routing.expert_weights)

    def prepare(self, hidden_states: Tensor) -> ExpertInput:
        """Turn float rows ``[T, H]`` into what the experts take; once for each token."""
        raise NotImplementedError

    def multiply(self, projection: str, rows: ExpertInput, expert_offsets: Tensor) -> Tensor:
        """Multiply sorted rows by their expert's ``projection``; returns float32."""
        raise NotImplementedError

    def compute(self, rows: ExpertInput, expert_offsets: Tensor) -> Tensor:
        """Run every expert on its rows.

        Args:
            rows: ``[n, H]`` from :meth:`prepare`, sorted by expert.
            expert_offsets: int64 ``[num_experts + 1]``.
        Returns:
            float32 ``[n, H]`` in the same order, unweighted.
        """
        gate = self.multiply("gate", rows, expert_offsets)
        up = self.multiply("up", rows, expert_offsets)
        inner = gated_activation(gate, up, self.activation)
        if self.has_norm:
            inner = rms_norm(inner, self.norm_eps) * self.norm_weight[expert_of_rows(expert_offsets, inner.shape[0])]
        return self.multiply("down", self.prepare(inner), expert_offsets)


class FloatExperts(GroupedExperts):
    """Experts with float weights: the twin. Weights may be stored in half precision for inference."""

    # oneDNN compiles a kernel for every new number of rows (about 1 ms each); multiples of 32
    # leave few enough of them to stay in its cache: 8× faster in training (docs/experiments.md).
    training_row_alignment = 32

    def __init__(self, config: ModelConfig, num_experts: int, is_shared: bool = False) -> None:
        super().__init__(config, num_experts, is_shared)
        for name, (out_features, in_features) in self.sizes.items():
            weight = torch.empty(num_experts, out_features, in_features)
            self.register_parameter(f"{name}_weight", nn.Parameter(nn.init.normal_(weight, std=in_features**-0.5)))

    def prepare(self, hidden_states: Tensor) -> ExpertInput:
        """Leave the rows as they are."""
        return ExpertInput(hidden_states, None)

    def multiply(self, projection: str, rows: ExpertInput, expert_offsets: Tensor) -> Tensor:
        """Multiply in the autocast dtype, float32 without autocast."""
        return grouped_matmul(rows.rows, self.get_parameter(f"{projection}_weight"), expert_offsets)


class Int4Experts(FloatExperts):
    """Experts whose weights are rounded to 4 bits in groups, with float activations, for training."""

    def multiply(self, projection: str, rows: ExpertInput, expert_offsets: Tensor) -> Tensor:
        """Multiply by the rounded weights in the autocast dtype, float32 without autocast."""
        weight = fake_quantize_int4(self.get_parameter(f"{projection}_weight"))
        return grouped_matmul(rows.rows, weight, expert_offsets)


class BitExperts(FloatExperts):
    """Experts that compute with ternary or binary weights and int8 activations, for training."""

    def prepare(self, hidden_states: Tensor) -> ExpertInput:
        """Quantize each row to int8, held in float, with straight-through gradients."""
        return ExpertInput(*fake_quantize_activation(hidden_states, self.straight_through))

    def multiply(self, projection: str, rows: ExpertInput, expert_offsets: Tensor) -> Tensor:
        """Multiply integers held in float, then rescale as the packed experts do."""
        assert rows.activation_scale is not None
        weight_q, weight_scale = fake_quantize_weight(self.get_parameter(f"{projection}_weight"), self.levels)
        sums = grouped_matmul(rows.rows, weight_q, expert_offsets)
        row_scale = weight_scale.view(-1, 1)[expert_of_rows(expert_offsets, sums.shape[0])]
        return sums * (rows.activation_scale * row_scale)


class PackedExperts(GroupedExperts, PackedModule):
    """Experts for inference: packed weights, true int8 activations, the same integers.

    Args:
        config: sizes and recipe.
        num_experts: experts held here.
        layout: how weights are packed.
        is_shared: these are the layer's shared experts, which have their own width.
    """

    def __init__(self, config: ModelConfig, num_experts: int, layout: Layout, is_shared: bool = False) -> None:
        super().__init__(config, num_experts, is_shared)
        self.hold_matrices({name: MatrixSizes(*size) for name, size in self.sizes.items()}, layout, (num_experts,))

    @classmethod
    def from_experts(cls, experts: BitExperts, config: ModelConfig, layout: Layout) -> "PackedExperts":
        """Quantize and pack trained experts."""
        packed = cls(config, experts.num_experts, layout, is_shared=experts.is_shared)
        packed.norm_weight.data.copy_(experts.norm_weight.detach())
        for name in PROJECTIONS:
            weight = experts.get_parameter(f"{name}_weight").detach()
            weight_ternary, weight_scale = quantize_weight(weight, experts.levels)
            packed.set_matrix(name, pack(weight_ternary, layout), weight_scale)
        return packed

    @property
    def weights(self) -> ExpertWeights:
        """All experts as the fused kernel takes them."""
        gate, up, down = (self.matrix(name) for name in PROJECTIONS)
        return ExpertWeights(gate, up, down, self.norm_weight.detach(), self.norm_eps, self.activation)

    def prepare(self, hidden_states: Tensor) -> ExpertInput:
        """Quantize each row to int8."""
        return ExpertInput(*select("quantize_activation", hidden_states.device.type)(hidden_states))

    def compute(self, rows: ExpertInput, expert_offsets: Tensor) -> Tensor:
        """Run every expert on its rows in one call: products exact in integers, each rescaled once."""
        expert_ffn = select("expert_ffn", rows.rows.device.type)
        output: Tensor = expert_ffn(rows.rows, rows.activation_scale, self.weights, expert_offsets)
        return output


def build_experts(
    config: ModelConfig, num_experts: int, layout: Layout | None = None, is_shared: bool = False
) -> GroupedExperts:
    """Make the experts that ``config`` asks for, with fresh weights.

    Args:
        config: sizes, recipe and precision.
        num_experts: how many of a layer's experts to hold.
        layout: if given, packed experts for inference (their bytes are to be loaded).
        is_shared: make the layer's shared experts, which a float backbone keeps in float.
    """
    if is_shared and config.has_float_backbone:
        return FloatExperts(config, num_experts, is_shared)
    if layout is not None:
        return PackedExperts(config, num_experts, layout, is_shared)
    kind = BitExperts if config.is_packable else Int4Experts if config.precision == "int4-experts" else FloatExperts
    return kind(config, num_experts, is_shared)


def expert_of_rows(expert_offsets: Tensor, num_rows: int) -> Tensor:
    """Return the expert that owns each sorted row, int64 ``[num_rows]``, from ``expert_offsets`` ``[E + 1]``."""
    rows = torch.arange(num_rows, device=expert_offsets.device)
    return torch.searchsorted(expert_offsets[1:], rows, right=True)


def grouped_matmul(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply sorted rows, each by its expert's matrix, in the autocast dtype.

    Args:
        rows: float ``[n, in_features]``, sorted by expert.
        weight: float ``[num_experts, out_features, in_features]``.
        expert_offsets: int64 ``[num_experts + 1]``.
    Returns:
        float32 ``[n, out_features]``.
    """
    in_features, out_features = rows.shape[-1], weight.shape[-2]
    # grouped_mm wants strides of whole 16 bytes; zeros beyond the last feature change nothing
    in_padding, out_padding = -in_features % 8, -out_features % 8
    if in_padding or out_padding:
        rows, weight = F.pad(rows, (0, in_padding)), F.pad(weight, (0, in_padding, 0, out_padding))
    device_type = rows.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32
    ends = expert_offsets[1:].to(torch.int32)
    output = F.grouped_mm(rows.to(dtype), weight.to(dtype).transpose(-2, -1), offs=ends)
    return output[:, :out_features].float()
