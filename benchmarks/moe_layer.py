"""Experts: grouped products against one dense product, the fused layer against its parts, and against torch.

    python -m benchmarks.moe_layer [--quick] [--json] [--output]

Shape of OLMoE-1B-7B (arXiv:2409.02060): 64 experts of 2048 x 1024, 8 a token. Rows are spread unevenly: a tenth of
the experts gets about four times the rows of the rest.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, add_arguments
from benchmarks.limits import read_call
from benchmarks.memory import keep_freed_memory
from benchmarks.plots import plot_shares
from benchmarks.rotation import default_total_bytes
from benchmarks.synthetic import build_packed_model
from benchmarks.ternary_linear import MatrixShape, make_weights, random_rows
from benchmarks.timing import compare
from moe_bitnet.config import ModelConfig
from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.experts import PackedExperts
from moe_bitnet.kernels import select
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.model import Block
from moe_bitnet.packing import LAYOUTS, Layout
from moe_bitnet.tiles import TiledTernary

NUM_EXPERTS, TOP_K = 64, 8
GATE = MatrixShape("OLMoE gate", 1024, 2048)
DOWN = MatrixShape("OLMoE down", 2048, 1024)
ROWS_EACH = (1, 4, 16, 64)


def uneven_offsets(num_experts: int, least: int) -> Tensor:
    """Return expert_offsets of experts with ``least`` to ``4 · least`` rows; every tenth has most."""
    counts = torch.full((num_experts,), least)
    counts[::10] = 4 * least
    counts[1::3] += least // 3
    return torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))


def measure_grouped(report: Report, layout: Layout, least: int) -> None:
    """All experts' gate projection in one call against one dense product of as much work."""
    weights = make_weights(GATE, layout, NUM_EXPERTS)
    offsets = uneven_offsets(NUM_EXPERTS, least)
    num_rows = int(offsets[-1])
    x_q, scale = random_rows(num_rows, GATE.in_features)
    grouped, dense, matrix = select("grouped_ternary_linear"), select("ternary_linear"), weights.select(0)
    turns = compare(
        {
            "grouped": lambda: grouped(x_q, scale, weights, offsets),
            "dense": lambda: dense(x_q, scale, matrix),
        },
        num_rounds=7 if report.is_quick else 21,
    )
    operations = 2.0 * num_rows * GATE.out_features * GATE.in_features
    report.add(
        "grouped_vs_dense",
        turns.speedup("grouped", "dense"),
        "ratio",
        baseline="dense product of the same work, GOPS",
        baseline_value=operations / turns["dense"].median_s / 1e9,
        detail={
            "format": layout,
            "threads": torch.get_num_threads(),
            "experts": NUM_EXPERTS,
            "rows_each": [least, 4 * least],
            "rows": num_rows,
            "gops": operations / turns["grouped"].median_s / 1e9,
            **turns.to_detail(),
        },
        at_least=0.85 if least >= 16 else None,
    )


def measure_ffn(report: Report, layout: Layout, least: int) -> None:
    """The fused expert FFN against the same steps as operations of their own, and against torch in bfloat16."""
    gate, up, down = (make_weights(shape, layout, NUM_EXPERTS, seed) for seed, shape in enumerate((GATE, GATE, DOWN)))
    experts = ExpertWeights(gate, up, down, torch.ones(NUM_EXPERTS, GATE.out_features), 1e-5, "swiglu")
    offsets = uneven_offsets(NUM_EXPERTS, least)
    x_q, scale = random_rows(int(offsets[-1]), GATE.in_features)
    fused = select("expert_ffn")
    turns = compare(
        {
            "fused": lambda: fused(x_q, scale, experts, offsets),
            "parts": _ffn_in_parts(x_q, scale, experts, offsets),
            "torch bfloat16": _torch_ffn(int(offsets[-1]), offsets),
        },
        num_rounds=5 if report.is_quick else 11,
    )
    for name, baseline in (("ffn_vs_parts", "parts"), ("ffn_vs_torch_bf16", "torch bfloat16")):
        report.add(
            name,
            turns.speedup("fused", baseline),
            "ratio",
            baseline=f"{baseline}, ms",
            baseline_value=turns[baseline].median_s * 1e3,
            detail={
                "format": layout,
                "threads": torch.get_num_threads(),
                "rows": int(offsets[-1]),
                "ms": turns["fused"].median_s * 1e3,
                **turns.to_detail(),
            },
        )


def _ffn_in_parts(x_q: Tensor, scale: Tensor, experts: ExpertWeights, offsets: Tensor) -> Callable[[], object]:
    multiply, normalize = select("grouped_ternary_linear"), select("rms_norm_quantize")
    assert isinstance(experts.gate, TiledTernary)
    gain = experts.norm_weight[0]

    def run() -> Tensor:
        gate = multiply(x_q, scale, experts.gate, offsets)
        up = multiply(x_q, scale, experts.up, offsets)
        inner_q, inner_scale = normalize(F.silu(gate) * up, gain, experts.norm_eps)
        output: Tensor = multiply(inner_q, inner_scale, experts.down, offsets)
        return output

    return run


def _torch_ffn(num_rows: int, offsets: Tensor) -> Callable[[], object]:
    x = torch.randn(num_rows, GATE.in_features).bfloat16()
    gate, up = (torch.zeros(NUM_EXPERTS, GATE.in_features, GATE.out_features).bfloat16() for _ in range(2))
    down = torch.zeros(NUM_EXPERTS, DOWN.in_features, DOWN.out_features).bfloat16()
    ends = offsets[1:].to(torch.int32)

    def run() -> Tensor:
        inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
        return F.grouped_mm(F.rms_norm(inner, (DOWN.in_features,)), down, offs=ends)

    return run


def measure_layer(report: Report, layout: Layout) -> None:
    """One token through whole MoE layers, one call each: share of the bandwidth of the bytes that are active."""
    layer_bytes = NUM_EXPERTS * 3 * GATE.out_features * GATE.in_features // (4 if layout == "2bit" else 5)
    num_layers = -(-default_total_bytes() // layer_bytes) // (2 if report.is_quick else 1)
    config = ModelConfig(
        vocab_size=64,
        hidden_size=GATE.in_features,
        intermediate_size=GATE.out_features,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=16,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
    )
    model = build_packed_model(config, layout)
    decoder = PackedDecoder(model, max_tokens=1)
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.moe.experts, PackedExperts)
    gate = block.moe.experts.weights.gate
    assert isinstance(gate, TiledTernary)
    expert_bytes = sum(
        matrix.tiles.nbytes // NUM_EXPERTS
        for matrix in (gate, block.moe.experts.weights.up, block.moe.experts.weights.down)
        if isinstance(matrix, TiledTernary)
    )
    active_bytes = num_layers * (TOP_K * expert_bytes + 4 * NUM_EXPERTS * config.hidden_size)
    hidden_states = torch.randn(1, config.hidden_size)
    read_buffer = torch.zeros(default_total_bytes(), dtype=torch.uint8)

    def all_layers() -> None:
        for index in range(num_layers):
            decoder.moe_layer(index, hidden_states)

    turns = compare({"layers": all_layers, "read": read_call(read_buffer)}, num_rounds=5 if report.is_quick else 15)
    read_rate = read_buffer.nbytes / turns["read"].median_s
    report.add(
        "layer_share_of_bandwidth",
        turns.speedup("layers", "read") * active_bytes / read_buffer.nbytes,
        "ratio",
        baseline="read probe, GB/s",
        baseline_value=read_rate / 1e9,
        detail={
            "format": layout,
            "threads": torch.get_num_threads(),
            "experts": NUM_EXPERTS,
            "top_k": TOP_K,
            "us_per_layer": turns["layers"].median_s / num_layers * 1e6,
            "active_mb_per_layer": active_bytes / num_layers / 1e6,
            **turns.to_detail(),
        },
    )


def main() -> None:
    """Measure everything and print it."""
    keep_freed_memory("benchmarks.moe_layer")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    with Report("moe_layer", arguments) as report:
        for layout in LAYOUTS:
            for least in ROWS_EACH:
                report.progress(f"grouped, {layout}, {least} rows an expert and more")
                measure_grouped(report, layout, least)
            report.progress(f"fused FFN, {layout}")
            measure_ffn(report, layout, least=16)
            report.progress(f"whole layer, one token, {layout}")
            measure_layer(report, layout)
        if report.output_path is not None:
            plot_shares(report.metrics, report.output_path.with_suffix(".png"), "Mixture-of-experts layers")


if __name__ == "__main__":
    main()
