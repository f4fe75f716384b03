"""Mixtral-8x7B's shape on this machine: 46.7B parameters, ternary, from random weights to tokens, with its peak memory.

    python -m benchmarks.mixtral [--layout base3] [--quick] [--json]

``benchmarks.decode`` runs this in a process of its own. Weights are drawn as packed bytes, layer by layer; embedding
and head are bfloat16. The peak is the kernel's own count (VmHWM), of the whole process, Python and torch included.
"""

import argparse
import sys
import time

import torch

from benchmarks.harness import Report, add_arguments
from benchmarks.limits import read_call
from benchmarks.peak_memory import resident_bytes
from benchmarks.synthetic import MIXTRAL_8X7B, build_packed_model
from benchmarks.ternary_peer import TernaryPeer
from benchmarks.timing import compare
from moe_bitnet.experts import PackedExperts
from moe_bitnet.model import Block, MoETransformer
from moe_bitnet.packing import LAYOUTS, Layout
from moe_bitnet.tiles import TiledTernary

QUICK_LAYERS = 2


def peak_rss_gb() -> float:
    """Return the most memory this process ever held, in 10⁹ bytes."""
    return resident_bytes("VmHWM") / 1e9


def build(layout: Layout, num_layers: int) -> tuple[MoETransformer, float]:
    """Build the model, with progress on stderr; returns it and the seconds it took."""
    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        print(f"\rmixtral: {done}/{total} modules, peak {peak_rss_gb():.1f} GB", end="", file=sys.stderr, flush=True)

    model = build_packed_model(MIXTRAL_8X7B.replace(num_layers=num_layers), layout, on_module=show)
    print(file=sys.stderr)
    return model, time.perf_counter() - start


def measure(report: Report, layout: Layout) -> None:
    """Decode single tokens in turns with a read of one layer's experts."""
    model, build_s = build(layout, QUICK_LAYERS if report.is_quick else MIXTRAL_8X7B.num_layers)
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.moe.experts, PackedExperts)
    gate = block.moe.experts.weights.gate
    assert isinstance(gate, TiledTernary)
    peer = TernaryPeer(model, "bfloat16", max_tokens=512)
    del model
    peer.prefill(16)
    turns = compare(
        {"token": peer.decode_token, "read": read_call(gate.tiles)},
        num_rounds=4 if report.is_quick else 12,
        num_calls=2,
        num_warmups=2,
    )
    seconds = turns["token"].median_s
    detail = {
        "format": layout,
        "threads": torch.get_num_threads(),
        "tokens_per_s": 1 / seconds,
        "active_gb": peer.active_bytes / 1e9,
        "weight_gb": peer.weight_bytes / 1e9,
        "build_s": build_s,
        "layers": QUICK_LAYERS if report.is_quick else MIXTRAL_8X7B.num_layers,
        **turns.to_detail(),
    }
    rate = gate.tiles.nbytes / turns["read"].median_s
    report.add(
        "mixtral_share_of_bandwidth",
        turns.speedup("token", "read") * peer.active_bytes / gate.tiles.nbytes,
        "ratio",
        baseline="read probe, GB/s",
        baseline_value=rate / 1e9,
        detail=detail,
        at_least=None if report.is_quick else 0.8,
    )
    report.add(
        "mixtral_peak_rss", peak_rss_gb(), "GB", detail={"format": layout}, at_most=None if report.is_quick else 14.0
    )


def main() -> None:
    """Measure and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--layout", choices=LAYOUTS, default="base3", help="bits a weight (default: base3)")
    arguments = parser.parse_args()
    with Report("decode", arguments) as report:
        measure(report, arguments.layout)


if __name__ == "__main__":
    main()
