"""Fill one cache to its last token in a process of its own, and count the peak of its memory.

    python -m benchmarks.sequence_fill --model smollm2-135m --format K4V4 --budget 64MiB --fill prefill

Prints one JSON object. ``benchmarks.max_sequence`` runs this once for every format. What is counted is the kernel's own
peak of resident memory (VmHWM) beyond the loaded model: the cache, and what passes through the model need beside it. A
short pass before brings in what loads late, and freed memory is given back to the system before counting begins;
with MALLOC_MMAP_THRESHOLD_=65536, as the benchmark sets it, also while it lasts, so that glibc's spare memory is not
counted.

Two ways to fill:

- ``prefill``: chunks of tokens pass through the whole model, attention over all that came before included.
- ``stored``: random keys and values are stored layer by layer with the attention left out, which takes a time quadratic
  in the length; packing them is what a real prefill does.

In both the last tokens are decoded one by one through the whole model (where there is one), attention included.
"""

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peak_memory import peak_bytes_during
from benchmarks.sequence_models import SUBJECTS, Subject
from kvcache.cache import PagedKVCache
from kvcache.memory import bytes_for_tokens, max_tokens
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS
from moe_bitnet.cli.threads import single_thread
from moe_bitnet.errors import CacheFullError
from moe_bitnet.units import parse_memory

FILLS = ("prefill", "stored")
CHUNK_LEN = 64
NUM_DECODED = 16
_NUM_WARM_TOKENS = 512


@dataclass
class Clock:
    """Seconds of the two phases."""

    fill_s: float = 0.0
    decode_s: float = 0.0


def fill_cache(subject: Subject, format_name: str, budget_bytes: int, fill: str) -> dict[str, Any]:
    """Fill a cache to its last token; returns tokens, peak and times."""
    key_bits, value_bits = CACHE_FORMATS[format_name]
    config = subject.cache_config(key_bits, value_bits)
    num_tokens, clock, stores = max_tokens(config, budget_bytes), Clock(), []

    def fill_whole() -> None:
        stores.append(subject.start(key_bits, value_bits, budget_bytes))
        _fill(subject, stores[0], num_tokens, fill, clock)

    warm_store = subject.start(key_bits, value_bits, bytes_for_tokens(config, _NUM_WARM_TOKENS))
    _fill(subject, warm_store, _NUM_WARM_TOKENS, fill, Clock())
    subject.stop()
    del warm_store
    _give_memory_back()
    peak_bytes = peak_bytes_during(fill_whole)
    _check_full(subject, stores[0], num_tokens)
    return {
        "tokens": num_tokens,
        "peak_bytes": peak_bytes,
        "allocated_bytes": stores[0].allocated_bytes,
        "effective_bits": config.effective_bits,
        "fill_s": clock.fill_s,
        "decode_token_s": clock.decode_s / NUM_DECODED,
        "weights": subject.weights,
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def _fill(subject: Subject, store: PagedKVCache, num_tokens: int, fill: str, clock: Clock) -> None:
    start = time.perf_counter()
    if fill == "prefill":
        _in_chunks(num_tokens - NUM_DECODED, subject.append)
    else:
        with _without_attention(store), single_thread():  # many small copies, that two threads would wait over
            _in_chunks(num_tokens - NUM_DECODED, subject.store_random)
    clock.fill_s = time.perf_counter() - start
    for _ in range(NUM_DECODED):
        subject.append(1)
    clock.decode_s = time.perf_counter() - start - clock.fill_s


def _in_chunks(num_tokens: int, append: Callable[[int], None]) -> None:
    for start in range(0, num_tokens, CHUNK_LEN):
        append(min(CHUNK_LEN, num_tokens - start))


@contextmanager
def _without_attention(store: PagedKVCache) -> Iterator[None]:
    """Let a cache store tokens and give the queries back."""
    attention = store._paged_attention
    store._paged_attention = lambda layer_format, frame, query, *others: query
    try:
        yield
    finally:
        store._paged_attention = attention


def _give_memory_back() -> None:
    """Return what was freed to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc
        return


@torch.inference_mode()
def _check_full(subject: Subject, store: PagedKVCache, num_tokens: int) -> None:
    """See that the cache holds what was planned, and that one token more is refused."""
    (sequence_id,) = store.sequence_ids
    assert store.length(sequence_id) == num_tokens
    store.check_integrity()
    try:
        subject.append(1)
    except CacheFullError:
        return
    raise AssertionError("the cache took a token beyond max_tokens")


def main() -> None:
    """Fill one cache and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SUBJECTS), required=True)
    parser.add_argument("--format", choices=CACHE_FORMATS, required=True)
    parser.add_argument("--budget", required=True, help="of the cache, such as 64MiB")
    parser.add_argument("--fill", choices=FILLS, required=True)
    arguments = parser.parse_args()
    subject = SUBJECTS[arguments.model]()
    result = fill_cache(subject, arguments.format, parse_memory(arguments.budget), arguments.fill)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
