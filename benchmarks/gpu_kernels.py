"""Check and time the Triton kernels on an NVIDIA GPU.

    python -m benchmarks.gpu_kernels [--quick] [--json]

Every operation is first compared with the reference backend (``benchmarks/gpu_checks.py``); a difference ends the run
with code 1. Then it is timed against ``torch.nn.functional.linear`` (the faster of float16 and bfloat16) and
``torch._int_mm``. Calls run from a CUDA graph over copies of the weights that exceed the L2 cache four times, so that
neither launches from Python nor a warm cache are measured. Shares refer to the bandwidth of a large copy (bytes read
and written) and to the best ``torch._int_mm``, both measured in the same run.

Without a GPU it says so and ends with code 2. A JSON line holds metric, value, unit, baseline, baseline_value, detail.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_checks import GPU_SIZES, Metric, Operations, random_rows, verify
from moe_bitnet.kernels.backend_triton import load_backend
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import LAYOUTS, Layout
from moe_bitnet.tiles import TiledTernary, block_bytes, num_row_blocks

CACHE_MULTIPLE = 4
INT_MM_MIN_ROWS = 32
"""``torch._int_mm`` takes more than 16 rows."""


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON line a metric")
    arguments = parser.parse_args()
    backend = load_backend()
    if backend.absent_because is not None:
        print(
            f"gpu_kernels needs an NVIDIA GPU and triton ({backend.absent_because}); nothing was measured.",
            file=sys.stderr,
        )
        return 2
    operations = dict(backend.operations)
    num_differences = 0
    for metric in verify(operations, torch.device("cuda"), GPU_SIZES):
        num_differences += metric.value > 0
        show(metric, arguments.json)
    if num_differences:
        print(f"gpu_kernels: {num_differences} checks differ from the reference; not timed.", file=sys.stderr)
        return 1
    for metric in measure(operations, arguments.quick):
        show(metric, arguments.json)
    return 0


def show(metric: Metric, as_json: bool) -> None:
    """Print a metric to stdout, as JSON or as a line of text."""
    if as_json:
        print(json.dumps(asdict(metric), allow_nan=False), flush=True)
        return
    beside = "" if metric.baseline is None else f"   {metric.baseline}: {metric.baseline_value:.4g}"
    print(f"{metric.metric:45s} {metric.value:10.4g} {metric.unit}{beside}   {metric.detail}", flush=True)


def measure(operations: Operations, is_quick: bool) -> Iterator[Metric]:
    """Time every operation on the current CUDA device.

    Args:
        operations: the backend's functions.
        is_quick: one shape, and fewer repetitions.
    """
    bandwidth, peak = copy_bandwidth(), int_mm_peak(is_quick)
    detail = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    yield Metric("gpu_kernels.copy_bandwidth", bandwidth / 1e9, "GB/s", detail=detail)
    yield Metric("gpu_kernels.int_mm_peak", peak / 1e12, "TOP/s", detail=detail)
    shapes = [(4096, 4096)] if is_quick else [(4096, 4096), (14336, 4096), (4096, 14336)]
    for out_features, in_features in shapes:
        for num_rows in (1, 8, 4096) if is_quick else (1, 8, 16, 64, 512, 4096):
            yield from _measure_linear(operations, num_rows, out_features, in_features, bandwidth, peak)
    for num_tokens in (1, 1024) if is_quick else (1, 16, 128, 1024, 4096):
        yield from _measure_experts(operations, num_tokens, bandwidth, peak)
    yield from _measure_quantizers(operations, bandwidth)


def _measure_linear(
    operations: Operations, num_rows: int, out_features: int, in_features: int, bandwidth: float, peak: float
) -> Iterator[Metric]:
    x_q, scale = (each.cuda() for each in random_rows(num_rows, in_features))
    num_operations = 2 * num_rows * out_features * in_features
    baselines = {}
    for dtype in (torch.float16, torch.bfloat16):
        x = x_q.to(dtype)
        weights = rotation(lambda dtype=dtype: torch.randn(out_features, in_features, dtype=dtype, device="cuda"))
        baselines[str(dtype)] = graph_seconds([lambda w=w, x=x: F.linear(x, w) for w in weights])
    half_name, half_seconds = min(baselines.items(), key=lambda item: item[1])
    int_mm_seconds = None
    if num_rows >= INT_MM_MIN_ROWS:
        weights = rotation(lambda: torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, device="cuda"))
        int_mm_seconds = graph_seconds([lambda w=w: torch._int_mm(x_q, w.T) for w in weights])
    for layout in LAYOUTS:
        copies = rotation(lambda layout=layout: random_tiles((), out_features, in_features, layout))
        seconds = graph_seconds([partial(operations["ternary_linear"], x_q, scale, weight) for weight in copies])
        num_bytes = copies[0].num_bytes + x_q.numel() + 4 * num_rows * out_features
        shape = {"num_rows": num_rows, "out_features": out_features, "in_features": in_features, "layout": layout}
        detail = {
            **shape,
            "seconds": seconds,
            "share_of_bandwidth": num_bytes / seconds / bandwidth,
            "share_of_peak": num_operations / seconds / peak,
        }
        yield Metric(
            "gpu_kernels.linear_vs_torch_half", half_seconds / seconds, "ratio", half_name, half_seconds, detail
        )
        if int_mm_seconds is not None:
            ratio = int_mm_seconds / seconds
            yield Metric("gpu_kernels.linear_vs_int_mm", ratio, "ratio", "torch._int_mm", int_mm_seconds, detail)


def _measure_experts(operations: Operations, num_tokens: int, bandwidth: float, peak: float) -> Iterator[Metric]:
    num_experts, top_k, inner_size, hidden_size = 8, 2, 14336, 4096
    num_rows = num_tokens * top_k
    choices = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
    counts = torch.bincount(choices.flatten(), minlength=num_experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).cuda()
    num_active = int((counts > 0).sum())
    x_q, scale = (each.cuda() for each in random_rows(num_rows, hidden_size))
    num_operations = 6 * num_rows * inner_size * hidden_size
    for layout in LAYOUTS:
        experts = ExpertWeights(
            random_tiles((num_experts,), inner_size, hidden_size, layout),
            random_tiles((num_experts,), inner_size, hidden_size, layout),
            random_tiles((num_experts,), hidden_size, inner_size, layout),
            torch.ones(num_experts, inner_size, device="cuda"),
            1e-5,
            "swiglu",
        )
        # all experts together exceed the cache; those of a few tokens may not
        seconds = graph_seconds([partial(operations["expert_ffn"], x_q, scale, experts, offsets)] * 4)
        num_bytes = sum(matrix.num_bytes for matrix in (experts.gate, experts.up, experts.down))
        active_bytes = num_bytes * num_active / num_experts
        one = ExpertWeights(
            *(one_expert(matrix) for matrix in (experts.gate, experts.up, experts.down)),
            experts.norm_weight[:1],
            1e-5,
            "swiglu",
        )
        all_rows = torch.tensor([0, num_rows], device="cuda")
        dense = graph_seconds([partial(operations["expert_ffn"], x_q, scale, one, all_rows)] * 4)
        detail = {
            "num_tokens": num_tokens,
            "num_experts": num_experts,
            "top_k": top_k,
            "layout": layout,
            "seconds": seconds,
            "share_of_bandwidth": active_bytes / seconds / bandwidth,
            "share_of_peak": num_operations / seconds / peak,
        }
        yield Metric(
            "gpu_kernels.expert_ffn_vs_one_expert", dense / seconds, "ratio", "one expert, all rows", dense, detail
        )


def _measure_quantizers(operations: Operations, bandwidth: float) -> Iterator[Metric]:
    num_rows, num_features = 8192, 4096
    copies = rotation(lambda: torch.randn(num_rows, num_features, dtype=torch.bfloat16, device="cuda"))
    gain = torch.ones(num_features, device="cuda")
    calls = {
        "quantize_activation": [lambda x=x: operations["quantize_activation"](x) for x in copies],
        "rms_norm_quantize": [lambda x=x: operations["rms_norm_quantize"](x, gain, 1e-5) for x in copies],
    }
    for name, functions in calls.items():
        seconds = graph_seconds(functions)
        share = 3 * num_rows * num_features / seconds / bandwidth  # 2 bytes in, 1 byte out
        detail = {"num_rows": num_rows, "num_features": num_features, "dtype": "bfloat16", "seconds": seconds}
        yield Metric(f"gpu_kernels.{name}_share_of_bandwidth", share, "ratio", detail=detail)


def graph_seconds(functions: list[Callable[[], object]], num_replays: int = 20) -> float:
    """Return the median seconds of one call, replayed from a CUDA graph that calls each function once."""
    for function in functions[:2]:
        function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    samples = []
    for _ in range(num_replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / len(functions))
    return statistics.median(samples)


def rotation(make: Callable[[], Any]) -> list[Any]:
    """Return copies that together exceed the L2 cache; at least two, at most 64."""
    first = make()
    num_bytes = first.num_bytes if isinstance(first, TiledTernary) else first.numel() * first.element_size()
    wanted = CACHE_MULTIPLE * torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(min(63, max(1, -(-wanted // num_bytes) - 1))))]


def copy_bandwidth() -> float:
    """Return bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds([lambda: target.copy_(source)])


def int_mm_peak(is_quick: bool) -> float:
    """Return operations a second (a multiply-add is two) of the best ``torch._int_mm`` of a few sizes."""
    best = 0.0
    for size in (8192,) if is_quick else (4096, 8192, 16384):
        x = torch.randint(-128, 128, (size, size), dtype=torch.int8, device="cuda")
        seconds = graph_seconds([lambda x=x: torch._int_mm(x, x.T)])
        best = max(best, 2 * size**3 / seconds)
    return best


def random_tiles(leading: tuple[int, ...], out_features: int, in_features: int, layout: Layout) -> TiledTernary:
    """Return tiles of random bytes on the GPU: their values do not matter where only time does."""
    shape = (*leading, num_row_blocks(out_features), block_bytes(in_features, layout))
    tiles = torch.randint(0, 243, shape, dtype=torch.uint8, device="cuda")
    scale = torch.ones((*leading, 1, 1), device="cuda")
    return TiledTernary(tiles, scale, out_features, in_features, layout)


def one_expert(weight: TiledTernary) -> TiledTernary:
    """Return the first matrix as the only one of a layer."""
    return TiledTernary(
        weight.tiles[:1], weight.weight_scale[:1], weight.out_features, weight.in_features, weight.layout
    )


if __name__ == "__main__":
    sys.exit(main())
