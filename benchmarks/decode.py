"""Whole models: tokens a second against llama.cpp and torch, and as a share of the memory bandwidth.

    python -m benchmarks.decode [--quick] [--json] [--output] [--parts dense paper_3b mixtral]

Three shapes with random weights: the body of BitNet b1.58 2B4T (2.2B parameters), the 3B model of the b1.58 paper,
and Mixtral-8x7B (in a process of its own, so that its peak memory is its own). Candidates take turns, token by token.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import Report, add_arguments
from benchmarks.limits import read_call
from benchmarks.memory import keep_freed_memory
from benchmarks.metrics import Metric
from benchmarks.peers.llama_cpp import PACKAGES, LlamaCppPeer
from benchmarks.peers.peer import Peer, PeerMissingError
from benchmarks.peers.shape import BITNET_2B4T_BODY, SyntheticShape
from benchmarks.peers.torch_dense import TorchDensePeer
from benchmarks.plots import plot_shares
from benchmarks.rotation import default_total_bytes
from benchmarks.synthetic import PAPER_3B, build_packed_model, dense_config
from benchmarks.ternary_peer import TernaryPeer
from benchmarks.timing import Comparison, compare
from moe_bitnet.packing import Layout
from moe_bitnet.table import TableFormat

PARTS = ("dense", "paper_3b", "mixtral")
PROMPT_TOKENS = 512
DECODE_PROMPT_TOKENS = 32
CANDIDATES: tuple[tuple[Layout, TableFormat], ...] = (("2bit", "bfloat16"), ("2bit", "int8"), ("base3", "int8"))
QUICK_SHAPE = SyntheticShape(
    num_layers=6, hidden_size=2560, intermediate_size=6912, num_heads=20, num_kv_heads=5, head_dim=128, vocab_size=8192
)
"""A few layers of the first shape, for a run of a minute: its figures say little."""


def measure_dense(report: Report, shape: SyntheticShape) -> None:
    """Our decoder in three settings against llama.cpp and torch in half precision, in turns."""
    with contextlib.ExitStack() as stack:
        ours = {name: stack.enter_context(contextlib.closing(peer)) for name, peer in _ours(report, shape)}
        llama = _llama(report, shape)
        if llama is not None:
            stack.enter_context(llama)
        halves = [TorchDensePeer(shape, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
        peers: dict[str, Peer] = {**ours, **({llama.name: llama} if llama else {}), **{p.name: p for p in halves}}
        report.progress("decode")
        turns = _decode(report, peers)
        _report_decode(report, "dense", ours, turns, llama)
        _report_int8_head(report, ours["2bit, bfloat16 head"], ours["2bit, int8 head"])
        report.progress(f"prefill of {PROMPT_TOKENS} tokens")
        prefills: dict[str, Peer] = {name: peer for name, peer in peers.items() if name != "torch float16"}
        prefill = compare(
            {name: _prefill_call(peer) for name, peer in prefills.items()},
            num_rounds=2 if report.is_quick else 5,
            num_settling_calls=0,
            num_warmups=1,
            max_repeats=1,
        )
        for name in ours:
            _report_prefill(report, name, prefill, llama)


def _ours(report: Report, shape: SyntheticShape) -> Iterator[tuple[str, TernaryPeer]]:
    for layout in ("2bit", "base3"):
        report.progress(f"building {shape.num_layers} layers of {shape.hidden_size}, {layout}")
        model = build_packed_model(dense_config(shape), layout)
        for candidate, table_format in CANDIDATES:
            if candidate == layout:
                yield f"{layout}, {table_format} head", TernaryPeer(model, table_format, max_tokens=1024)


def _llama(report: Report, shape: SyntheticShape) -> LlamaCppPeer | None:
    try:
        report.progress("writing and loading the same shape for llama.cpp, TQ2_0")
        return LlamaCppPeer(shape, num_threads=torch.get_num_threads())
    except PeerMissingError as error:
        report.progress(str(error))
        return None


def _decode(report: Report, peers: dict[str, Peer]) -> Comparison:
    """Time single tokens of all peers in turns, with a read of memory as one more candidate."""
    for peer in peers.values():
        peer.prefill(DECODE_PROMPT_TOKENS)
    buffer = torch.zeros(default_total_bytes(), dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {name: peer.decode_token for name, peer in peers.items()}
    return compare(
        {**calls, "read": read_call(buffer)}, num_rounds=4 if report.is_quick else 12, num_calls=5, num_warmups=3
    )


def _report_decode(
    report: Report, model: str, ours: dict[str, TernaryPeer], turns: Comparison, llama: LlamaCppPeer | None
) -> None:
    half = min(("torch float16", "torch bfloat16"), key=lambda name: turns[name].median_s)
    read_rate = default_total_bytes() / turns["read"].median_s
    for name, peer in ours.items():
        seconds = turns[name].median_s
        profile = peer.profile_tokens(20)
        detail = {
            "model": model,
            "setting": name,
            "threads": torch.get_num_threads(),
            "tokens_per_s": 1 / seconds,
            "active_mb": peer.active_bytes / 1e6,
            **turns.to_detail(),
        }
        report.add(
            "decode_share_of_bandwidth",
            peer.active_bytes / seconds / read_rate,
            "ratio",
            baseline="read probe, GB/s",
            baseline_value=read_rate / 1e9,
            detail=detail,
        )
        report.add(
            "overhead_share",
            profile.outside_share,
            "ratio",
            detail={
                "model": model,
                "setting": name,
                "counts": "Python and binding: wall time outside the library",
                "norms_routing_waiting_share": profile.other_share,
                "products_share": profile.products_share,
                "attention_share": profile.attention_share,
                "head_share": profile.head_share,
            },
            at_most=0.05,
        )
        report.add(
            "decode_vs_torch_half",
            turns.speedup(name, half),
            "ratio",
            baseline=f"{half}, tokens/s",
            baseline_value=1 / turns[half].median_s,
            detail=detail,
            at_least=7.0,
        )
        if llama is not None:
            report.add(
                "decode_vs_llamacpp",
                turns.speedup(name, llama.name),
                "ratio",
                baseline=f"{llama.name}, Q8_0 head, tokens/s",
                baseline_value=1 / turns[llama.name].median_s,
                detail=detail,
                at_least=2.1,
            )


def _report_int8_head(report: Report, exact: TernaryPeer, rounded: TernaryPeer, num_tokens: int = 64) -> None:
    """Feed both the same tokens: what an int8 embedding and head do to the logits of one model."""
    changes, spreads, agreements = [], [], []
    for peer in (exact, rounded):
        peer.prefill(1)
    for token_id in range(num_tokens):
        expected, actual = exact.append(token_id), rounded.append(token_id)
        changes.append((actual - expected).square().mean())
        spreads.append(expected.var())
        agreements.append(actual.argmax() == expected.argmax())
    report.add(
        "int8_head_logit_change",
        float((torch.stack(changes).mean() / torch.stack(spreads).mean()).sqrt()),
        "ratio",
        baseline="standard deviation of the logits with a bfloat16 head",
        detail={
            "top1_agreement": float(torch.stack(agreements).float().mean()),
            "tokens": num_tokens,
            "weights": "random",
        },
    )


def _prefill_call(peer: Peer) -> Callable[[], object]:
    return lambda: peer.prefill(PROMPT_TOKENS)


def _report_prefill(report: Report, name: str, turns: Comparison, llama: LlamaCppPeer | None) -> None:
    rate = PROMPT_TOKENS / turns[name].median_s
    detail = {"setting": name, "threads": torch.get_num_threads(), "tokens_per_s": rate, **turns.to_detail()}
    baselines = [("prefill_vs_torch_bf16", "torch bfloat16", None)]
    if llama is not None:
        baselines.insert(0, ("prefill_vs_llamacpp", llama.name, 5.0))
    for metric, baseline, goal in baselines:
        report.add(
            metric,
            turns.speedup(name, baseline),
            "ratio",
            baseline=f"{baseline}, tokens/s",
            baseline_value=PROMPT_TOKENS / turns[baseline].median_s,
            detail=detail,
            at_least=goal,
        )


def measure_paper_3b(report: Report, shape: SyntheticShape) -> None:
    """The paper's 3B shape against torch in half precision: speed, and memory of the weights."""
    report.progress("building the 3B shape, base3")
    model = build_packed_model(dense_config(shape), "base3")
    ours = {f"base3, {table} head": TernaryPeer(model, table, max_tokens=256) for table in ("bfloat16", "int8")}
    del model
    seconds: dict[str, Comparison] = {}
    for dtype in (torch.float16, torch.bfloat16):  # one after the other: 7 GB each
        half = TorchDensePeer(shape, dtype=dtype, max_seq_len=256)
        peers: dict[str, Peer] = {**ours, half.name: half}
        for peer in peers.values():
            peer.prefill(DECODE_PROMPT_TOKENS // 4)
        report.progress(f"decode against {half.name}")
        calls: dict[str, Callable[[], object]] = {name: peer.decode_token for name, peer in peers.items()}
        seconds[half.name] = compare(calls, num_rounds=3 if report.is_quick else 8, num_calls=4, num_warmups=2)
        half_bytes = half.weight_bytes
        del half, peers, calls
    fastest = min(seconds, key=lambda name: seconds[name][name].median_s)
    turns = seconds[fastest]
    for (name, peer), least in zip(ours.items(), (6.0, 8.0), strict=True):
        report.add(
            "paper_3b_speedup",
            turns.speedup(name, fastest),
            "ratio",
            baseline=f"{fastest}, tokens/s",
            baseline_value=1 / turns[fastest].median_s,
            detail={
                "setting": name,
                "threads": torch.get_num_threads(),
                "tokens_per_s": 1 / turns[name].median_s,
                "paper_on_gpu": 2.71,
                **turns.to_detail(),
            },
            at_least=7.0,
        )
        report.add(
            "paper_3b_memory",
            half_bytes / peer.weight_bytes,
            "ratio",
            baseline="float16 weights, GB",
            baseline_value=half_bytes / 1e9,
            detail={
                "setting": name,
                "gb": peer.weight_bytes / 1e9,
                "counts": "all weights held, embedding, head, norms and scales included",
                "paper_on_gpu": 3.55,
            },
            at_least=least,
        )
        peer.close()


def measure_mixtral(report: Report) -> None:
    """Mixtral-8x7B in a process of its own; its lines are taken over."""
    for layout in ("2bit", "base3"):
        report.progress(f"Mixtral-8x7B, {layout}, in a process of its own")
        command = [sys.executable, "-m", "benchmarks.mixtral", "--json", "--layout", layout]
        command += ["--quick"] if report.is_quick else []
        # without this process's allocator settings: they keep freed memory, which the peak would count
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        lines = result.stdout.splitlines()
        for line in lines:
            metric = Metric.from_json_line(line)
            report.metrics.append(metric)
            if report.prints_json:
                print(line, flush=True)


def main() -> None:
    """Measure everything and print it."""
    keep_freed_memory("benchmarks.decode")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which models (default: all)")
    arguments = parser.parse_args()
    with Report("decode", arguments, extra_packages=PACKAGES) as report:
        if "mixtral" in arguments.parts:  # first, while this process holds nothing
            measure_mixtral(report)
        if "dense" in arguments.parts:
            measure_dense(report, QUICK_SHAPE if report.is_quick else BITNET_2B4T_BODY)
        if "paper_3b" in arguments.parts and not report.is_quick:
            measure_paper_3b(report, PAPER_3B)
        if report.output_path is not None:
            plot_shares(report.metrics, report.output_path.with_suffix(".png"), "Whole models")


if __name__ == "__main__":
    main()
