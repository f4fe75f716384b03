"""Attention over packed pages by depth: against torch's fastest formulation, our own float16 pages and the bandwidth.

    python -m benchmarks.paged_attention [--quick] [--json] [--output]

One layer of LLaMA-3-8B (32 query heads, 8 KV heads of 128 channels), one new token, 1k to 256k tokens in the cache.
torch gets every formulation and dtype that computes the same (SDPA with grouped queries as rows or by enable_gqa,
and two products with a softmax between them); the fastest one at each depth is the baseline. All candidates take
turns, each with copies of its keys and values that no cache holds, as in a model of many layers.

Prefill: 8k tokens in chunks through ``PagedKVCache.extend``, sealing included, against float16 SDPA of all tokens at
once; memory beyond the cache by peak resident size.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, add_arguments
from benchmarks.limits import read_call
from benchmarks.memory import keep_freed_memory
from benchmarks.paged_plots import plot_by_depth
from benchmarks.paged_prefill import measure_prefill
from benchmarks.rotation import default_total_bytes
from benchmarks.timing import Comparison, compare
from kvcache import KVCacheConfig
from kvcache.calibration import calibrated_frames
from kvcache.codec import write_exact_layer
from kvcache.frame import LayerFrame
from kvcache.kernels import select
from kvcache.kernels.batch import PagedBatch
from kvcache.moments import Moments
from kvcache.page import PAGE_SIZE, LayerFormat

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
FORMATS = {"FP16": (16, 16), "K8V8": (8, 8), "K8V4": (8, 4), "K4V4": (4, 4), "K4V2": (4, 2), "K2V2": (2, 2)}
DEPTHS = tuple(2**power * 1024 for power in range(9))
QUICK_DEPTHS = (1024, 8192, 32768)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Formulations slower than this multiple of the fastest in one trial are left out of the turns.
PLAUSIBLE = 2.0
NUM_TEMPLATES = 8
GOALS_VS_TORCH = {("K8V8", 32768): 3.0, ("K4V4", 32768): 5.0}
GOALS_VS_OWN = {("K8V8", 32768): 1.5, ("K4V4", 32768): 2.5}
GOAL_BANDWIDTH, DEPTH_OF_BANDWIDTH = 0.70, 131072

Call = Callable[[], object]


@dataclass
class PackedSequence:
    """Copies of one layer's pages of a sequence, all in one pool.

    Attributes:
        call: attends from one token; each time with the next copy.
        num_bytes: bytes that a call reads.
    """

    call: Call
    num_bytes: int


def random_layer(key_bits: int, value_bits: int) -> tuple[LayerFormat, LayerFrame]:
    """Return a layer whose keys are cut into the segments of a calibrated model, with maps from random moments."""
    config = KVCacheConfig(1, NUM_KV_HEADS, HEAD_DIM, key_bits, value_bits)
    moments = Moments.zeros(1, NUM_KV_HEADS, HEAD_DIM)
    moments.add(0, *(torch.randn(1024, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)))
    return config.page_format(is_calibrated=True).layers[0], calibrated_frames(moments, config)[0]


def packed_sequence(name: str, depth: int) -> PackedSequence:
    """Fill pages of a format with random tokens: a few are encoded, the rest are copies of them."""
    layer, frame = random_layer(*FORMATS[name])
    num_pages = depth // PAGE_SIZE
    templates = torch.zeros(NUM_TEMPLATES, layer.layer_bytes, dtype=torch.uint8)
    for template in templates:
        exact = torch.zeros(layer.exact_layer_bytes, dtype=torch.uint8)
        write_exact_layer(layer, exact, 0, *torch.randn(2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM).unbind())
        select("encode_page")(layer, frame, exact, template)
    num_copies = max(2, default_total_bytes() // (num_pages * layer.layer_bytes))
    pool = torch.empty(num_copies * num_pages, layer.layer_bytes, dtype=torch.uint8)
    for start in range(0, len(pool), NUM_TEMPLATES):
        pool[start : start + NUM_TEMPLATES] = templates[: len(pool) - start]
    # as in a cache that has been in use for a while: a sequence's pages lie anywhere
    page_ids = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).int().view(num_copies, num_pages)
    query, key, value = (torch.randn(1, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    attend = select("paged_attention")
    batches = itertools.cycle([_batch(pool, ids) for ids in page_ids])
    return PackedSequence(lambda: attend(layer, frame, query, key, value, next(batches)), num_pages * layer.layer_bytes)


def _batch(pool: Tensor, page_ids: Tensor) -> PagedBatch:
    num_pages = len(page_ids)
    return PagedBatch(
        packed=pool,
        exact=torch.zeros(1, 4 * NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM, dtype=torch.uint8),
        packed_layer_offset=0,
        exact_layer_offset=0,
        row_offsets=torch.tensor([0, 1]),
        page_offsets=torch.tensor([0, num_pages]),
        page_ids=page_ids.contiguous(),
        page_is_packed=torch.ones(num_pages, dtype=torch.uint8),
        page_num_tokens=torch.full((num_pages,), PAGE_SIZE, dtype=torch.int32),
        scale=HEAD_DIM**-0.5,
    )


def torch_candidates(depth: int) -> dict[str, Call]:
    """Every formulation of the same attention in torch, by name."""
    calls: dict[str, Call] = {}
    for dtype_name, dtype in DTYPES.items():
        num_bytes = 2 * depth * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
        num_copies = max(2, default_total_bytes() // num_bytes)
        # [copies, keys and values, KV heads, tokens, channels]
        copies = torch.randn(2, NUM_KV_HEADS, depth, HEAD_DIM).to(dtype).repeat(num_copies, 1, 1, 1, 1)
        query = torch.randn(NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM).to(dtype)
        for name, function in FORMULATIONS.items():
            calls[f"{name} {dtype_name}"] = _rotating(function, query, copies)
    return calls


def _rotating(function: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, copies: Tensor) -> Call:
    indices = itertools.cycle(range(len(copies)))

    def call() -> Tensor:
        key, value = copies[next(indices)]
        return function(query, key, value)

    return call


def _matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (query @ key.transpose(1, 2) * HEAD_DIM**-0.5).softmax(dim=-1)
    return weights @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query[None], key[None], value[None])


def _gqa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = query.reshape(1, NUM_HEADS, 1, HEAD_DIM)
    return F.scaled_dot_product_attention(rows, key[None], value[None], enable_gqa=True)


FORMULATIONS = {"grouped matmul": _matmul, "SDPA, groups as rows": _sdpa, "SDPA, enable_gqa": _gqa}


def measure_depth(report: Report, depth: int) -> None:
    """All formats and torch's plausible formulations at one depth, in turns."""
    with torch.inference_mode():
        packed = {name: packed_sequence(name, depth) for name in FORMATS}
        candidates = torch_candidates(depth)
        trial = compare(candidates, num_rounds=2, num_warmups=1, max_repeats=0)
        fastest = min(trial[name].min_s for name in candidates)
        plausible = {name: call for name, call in candidates.items() if trial[name].min_s < PLAUSIBLE * fastest}
        read_buffer = torch.zeros(default_total_bytes(), dtype=torch.uint8)
        turns = compare(
            {**{name: each.call for name, each in packed.items()}, **plausible, "read": read_call(read_buffer)},
            num_rounds=7 if report.is_quick else 15,
            num_calls=max(1, min(20, 32768 // depth)),
        )
    baseline = min(plausible, key=lambda name: turns[name].median_s)
    read_rate = read_buffer.nbytes / turns["read"].median_s
    for name, each in packed.items():
        _report_format(report, depth, name, each.num_bytes, turns, baseline, read_rate)


def _report_format(
    report: Report, depth: int, name: str, num_bytes: int, turns: Comparison, baseline: str, read_rate: float
) -> None:
    detail = {
        "format": name,
        "depth": depth,
        "threads": torch.get_num_threads(),
        "us": turns[name].median_s * 1e6,
        "GB_per_s": num_bytes / turns[name].median_s / 1e9,
        "spread_s": [turns[name].p10_s, turns[name].p90_s],
        "other_cpu_share": turns[name].other_cpu_share,
    }
    report.add(
        "speedup_vs_torch",
        turns.speedup(name, baseline),
        "ratio",
        baseline=f"torch {baseline}, us",
        baseline_value=turns[baseline].median_s * 1e6,
        detail=detail,
        at_least=GOALS_VS_TORCH.get((name, depth), 1.0),
    )
    if name != "FP16":
        report.add(
            "speedup_vs_own_fp16",
            turns.speedup(name, "FP16"),
            "ratio",
            baseline="our float16 pages, us",
            baseline_value=turns["FP16"].median_s * 1e6,
            detail=detail,
            at_least=GOALS_VS_OWN.get((name, depth), 1.0),
        )
    report.add(
        "share_of_bandwidth",
        num_bytes / turns[name].median_s / read_rate,
        "ratio",
        baseline="read probe, GB/s",
        baseline_value=read_rate / 1e9,
        detail=detail,
        at_least=GOAL_BANDWIDTH if depth == DEPTH_OF_BANDWIDTH else None,
    )


def main() -> None:
    """Measure everything and print it."""
    keep_freed_memory("benchmarks.paged_attention")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with Report("paged_attention", arguments) as report:
        measure_prefill(report)
        for depth in QUICK_DEPTHS if report.is_quick else DEPTHS:
            report.progress(f"one token, {depth} tokens in the cache")
            measure_depth(report, depth)
        if report.output_path is not None:
            plot_by_depth(report.metrics, report.output_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
