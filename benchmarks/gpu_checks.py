"""Compare the Triton kernels with the reference backend: the checks of ``benchmarks/gpu_kernels.py``.

They run on a GPU before anything is timed, and in Triton's interpreter in a test, on the smaller shapes.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_bitnet.inference_math import gated_activation, rms_norm
from moe_bitnet.kernels import backend_reference as reference
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.kernels.registry import Operation
from moe_bitnet.packing import LAYOUTS, Layout, PackedTernary, pack
from moe_bitnet.quantization import activation_absmax
from moe_bitnet.tiles import TiledTernary, tile

Operations = dict[str, Operation]

EXPERT_FLIP_SHARE = 0.01
"""int8 values after a norm that may differ by one: norm and sigmoid are float32 here, float64 in the reference."""
SCALE_TOLERANCE = 16 * torch.finfo(torch.float32).eps
"""Relative, for what follows a norm or a sigmoid: a dozen roundings of float32."""


@dataclass(frozen=True)
class Metric:
    """One line of the result; see ``benchmarks/README.md``."""

    metric: str
    value: float
    unit: str
    baseline: str | None = None
    baseline_value: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Shapes to verify.

    Attributes:
        num_rows: rows of x for the plain product.
        in_features: inputs.
        out_features: outputs.
        rows_per_expert: rows of each expert for the grouped product.
    """

    num_rows: int
    in_features: int
    out_features: int
    rows_per_expert: tuple[int, ...]


TINY_SIZES = (Sizes(1, 33, 65, (0, 1, 3)), Sizes(40, 150, 70, (33, 0, 7)))
"""Small enough for Triton's interpreter."""
GPU_SIZES = (
    *TINY_SIZES,
    Sizes(1, 4096, 4096, (1, 0, 1, 2)),
    Sizes(16, 4099, 1001, (16, 0, 5)),
    Sizes(33, 4096, 1536, (0, 33, 70)),
    Sizes(1000, 2050, 4096, (500, 0, 301, 1)),
)


def verify(operations: Operations, device: torch.device, all_sizes: tuple[Sizes, ...]) -> Iterator[Metric]:
    """Compare every operation with the reference; yields how many values differ, for each operation and shape.

    Args:
        operations: the backend's functions.
        device: where to run; the CPU if Triton interprets.
        all_sizes: shapes.
    """
    for index, sizes in enumerate(all_sizes):
        generator = torch.Generator().manual_seed(index)
        yield from _verify_quantizers(operations, device, sizes, generator)
        for layout in LAYOUTS:
            yield from _verify_products(operations, device, sizes, layout, generator)


def _verify_quantizers(
    operations: Operations, device: torch.device, sizes: Sizes, generator: torch.Generator
) -> Iterator[Metric]:
    detail = {"shape": [sizes.num_rows, sizes.in_features]}
    x = torch.randn(sizes.num_rows, sizes.in_features, generator=generator) * 3
    x_q, scale = (each.cpu() for each in operations["quantize_activation"](x.to(device)))
    expected_q, expected_scale = reference.quantize_activation(x)
    differences = int((x_q != expected_q).sum() + (scale != expected_scale).sum())
    yield Metric("gpu_kernels.quantize_activation_differences", differences, "count", detail=detail)
    gain = torch.randn(sizes.in_features, generator=generator)
    x_q, scale = (each.cpu() for each in operations["rms_norm_quantize"](x.to(device), gain.to(device), 1e-5))
    expected_q, expected_scale = reference.rms_norm_quantize(x, gain, 1e-5)
    yield Metric(
        "gpu_kernels.rms_norm_quantize_differences",
        _num_beyond_rounding(x_q, expected_q, scale, expected_scale),
        "count",
        detail={**detail, "allowed": f"int8 values that differ by one, at most {EXPERT_FLIP_SHARE:.0%} of a tensor"},
    )


def _num_beyond_rounding(x_q: Tensor, expected_q: Tensor, scale: Tensor, expected_scale: Tensor) -> int:
    """Count int8 values off by more than one, by one beyond their share, and scales off by more than 16 ulp."""
    distance = (x_q.int() - expected_q.int()).abs()
    too_many_flips = max(0, int((distance == 1).sum()) - max(1, int(EXPERT_FLIP_SHARE * x_q.numel())))
    scale_error = (scale - expected_scale).abs() / expected_scale
    return int((distance > 1).sum()) + too_many_flips + int((scale_error > SCALE_TOLERANCE).sum())


def _verify_products(
    operations: Operations, device: torch.device, sizes: Sizes, layout: Layout, generator: torch.Generator
) -> Iterator[Metric]:
    detail = {**asdict(sizes), "layout": layout}
    weight = random_weight((sizes.out_features, sizes.in_features), layout, generator)
    x_q, scale = random_rows(sizes.num_rows, sizes.in_features, generator)
    output = operations["ternary_linear"](x_q.to(device), scale.to(device), to_device(weight, device)).cpu()
    differences = int((output != reference.ternary_linear(x_q, scale, weight)).sum())
    yield Metric("gpu_kernels.ternary_linear_differences", differences, "count", detail=detail)

    num_experts = len(sizes.rows_per_expert)
    offsets = torch.tensor([0, *sizes.rows_per_expert]).cumsum(0)
    x_q, scale = random_rows(int(offsets[-1]), sizes.in_features, generator)
    experts = random_experts(num_experts, sizes.out_features, sizes.in_features, layout, generator)
    on_device = experts_to_device(experts, device)
    arguments = (x_q.to(device), scale.to(device))
    output = operations["grouped_ternary_linear"](*arguments, on_device.gate, offsets.to(device)).cpu()
    differences = int((output != reference.grouped_ternary_linear(x_q, scale, experts.gate, offsets)).sum())
    yield Metric("gpu_kernels.grouped_ternary_linear_differences", differences, "count", detail=detail)

    output = operations["expert_ffn"](*arguments, on_device, offsets.to(device)).cpu()
    expected = reference.expert_ffn(x_q, scale, experts, offsets)
    # an inner int8 value that is off by one moves an output by one step at most
    step = _inner_scale(x_q, scale, experts, offsets) * experts.down.weight_scale.flatten()[_expert_of_row(offsets)]
    allowed = step * max(1.0, EXPERT_FLIP_SHARE * sizes.out_features) + SCALE_TOLERANCE * expected.abs()
    differences = int((~((output - expected).abs() <= allowed)).sum())
    yield Metric("gpu_kernels.expert_ffn_differences", differences, "count", detail=detail)


def _inner_scale(x_q: Tensor, scale: Tensor, experts: ExpertWeights, offsets: Tensor) -> Tensor:
    """Return the scales of the int8 rows between the reference's up and down, ``[num_rows, 1]``."""
    gate = reference.grouped_ternary_linear(x_q, scale, experts.gate, offsets)
    up = reference.grouped_ternary_linear(x_q, scale, experts.up, offsets)
    inner = rms_norm(gated_activation(gate, up, experts.activation), experts.norm_eps)
    return activation_absmax(inner * experts.norm_weight[_expert_of_row(offsets).squeeze(-1)])


def _expert_of_row(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(offsets.diff()).unsqueeze(-1)


def random_rows(num_rows: int, in_features: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 rows and a float32 scale each, on the CPU."""
    x_q = torch.randint(-128, 128, (num_rows, in_features), generator=generator, dtype=torch.int8)
    return x_q, torch.rand(num_rows, 1, generator=generator) + 1e-3


def random_weight(shape: tuple[int, ...], layout: Layout, generator: torch.Generator) -> TiledTernary:
    """Return random ternary matrices as tiles, on the CPU."""
    ternary = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand((*shape[:-2], 1, 1), generator=generator) + 1e-3
    return tile(PackedTernary(pack(ternary, layout), scale, shape[-1], layout))


def random_experts(
    num_experts: int, inner_size: int, hidden_size: int, layout: Layout, generator: torch.Generator
) -> ExpertWeights:
    """Return the random weights of a layer's experts, on the CPU."""
    return ExpertWeights(
        random_weight((num_experts, inner_size, hidden_size), layout, generator),
        random_weight((num_experts, inner_size, hidden_size), layout, generator),
        random_weight((num_experts, hidden_size, inner_size), layout, generator),
        torch.rand(num_experts, inner_size, generator=generator) + 0.5,
        1e-5,
        "swiglu",
    )


def to_device(weight: TiledTernary, device: torch.device) -> TiledTernary:
    """Return the weight on another device."""
    return TiledTernary(
        weight.tiles.to(device),
        weight.weight_scale.to(device),
        weight.out_features,
        weight.in_features,
        weight.layout,
    )


def experts_to_device(experts: ExpertWeights, device: torch.device) -> ExpertWeights:
    """Return the weights of a layer on another device; they must be tiles."""
    gate, up, down = experts.gate, experts.up, experts.down
    assert isinstance(gate, TiledTernary), "random_experts makes tiles"
    assert isinstance(up, TiledTernary), "random_experts makes tiles"
    assert isinstance(down, TiledTernary), "random_experts makes tiles"
    return ExpertWeights(
        to_device(gate, device),
        to_device(up, device),
        to_device(down, device),
        experts.norm_weight.to(device),
        experts.norm_eps,
        experts.activation,
    )
