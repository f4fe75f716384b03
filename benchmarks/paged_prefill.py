"""Prefill through the cache, sealing included: time and memory against float16 SDPA; a part of ``paged_attention``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report
from benchmarks.peak_memory import peak_bytes_during
from benchmarks.timing import compare
from kvcache import KVCacheConfig
from kvcache.cache import PagedKVCache
from kvcache.memory import bytes_for_tokens

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
NUM_TOKENS, QUICK_TOKENS, CHUNK = 8192, 2048, 512
FORMATS = {"FP16": (16, 16), "K8V8": (8, 8), "K4V4": (4, 4), "K2V2": (2, 2)}
GOAL_TIME, GOAL_BYTES = 1.3, 64 * 2**20


def measure_prefill(report: Report) -> None:
    """Feed a prompt chunk by chunk to caches of one layer, and to SDPA at once."""
    num_tokens = QUICK_TOKENS if report.is_quick else NUM_TOKENS
    query, key, value = (torch.randn(num_tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    caches = {name: _cache(bits, num_tokens) for name, bits in FORMATS.items()}
    report.progress(f"prefill of {num_tokens} tokens in chunks of {CHUNK}")
    with torch.inference_mode():
        calls = {name: (lambda cache=cache: _prefill(cache, query, key, value)) for name, cache in caches.items()}
        half = [x.transpose(0, 1)[None].half() for x in (query, key, value)]
        calls["SDPA fp16"] = lambda: F.scaled_dot_product_attention(*half, is_causal=True, enable_gqa=True)
        turns = compare(calls, num_rounds=3, num_settling_calls=0, num_warmups=1, max_repeats=1)
        chunk_bytes = CHUNK * (2 * NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM * 4
        for name in FORMATS:
            _report(report, name, num_tokens, turns, peak_bytes_during(calls[name]), chunk_bytes)


def _report(report: Report, name: str, num_tokens: int, turns, peak_bytes: int, chunk_bytes: int) -> None:
    detail = {
        "format": name,
        "tokens": num_tokens,
        "chunk": CHUNK,
        "threads": torch.get_num_threads(),
        "ms": turns[name].median_s * 1e3,
        "other_cpu_share": turns[name].other_cpu_share,
    }
    report.add(
        "prefill_time_vs_sdpa",
        1 / turns.speedup(name, "SDPA fp16"),
        "ratio",
        baseline="torch SDPA fp16 of all tokens at once, ms",
        baseline_value=turns["SDPA fp16"].median_s * 1e3,
        detail=detail,
        at_most=GOAL_TIME,
    )
    report.add(
        "prefill_bytes_beyond_cache",
        peak_bytes,
        "bytes",
        baseline="one chunk of queries, keys, values and outputs in float32",
        baseline_value=chunk_bytes,
        detail=detail,
        at_most=chunk_bytes + GOAL_BYTES,
    )


def _cache(bits: tuple[int, int], num_tokens: int) -> PagedKVCache:
    config = KVCacheConfig(1, NUM_KV_HEADS, HEAD_DIM, *bits)
    return PagedKVCache(config, bytes_for_tokens(config, num_tokens))


def _prefill(cache: PagedKVCache, query: Tensor, key: Tensor, value: Tensor) -> None:
    sequence_id = cache.new_sequence()
    for start in range(0, len(query), CHUNK):
        chunk = slice(start, start + CHUNK)
        cache.extend(0, [sequence_id], query[chunk], key[chunk], value[chunk])
    cache.free(sequence_id)
