"""``generate`` of a real model at depth: our caches against transformers' quantized ones, time a token.

    MOE_BITNET_SMOLLM2=FOLDER python -m benchmarks.paged_generate [--quick] [--json] [--output]

SmolLM2-135M (``real_model.py`` says how to get it) reads a long prompt into every cache, 512 tokens at a time; then all
caches take turns, one greedy token each, through the model's own forward pass. The model alone (a token without any
past) takes its turn, too: ``cache_vs_hf_quantized`` compares what the caches add to it. Transformers'
``QuantizedCache`` has 4 bits in groups of 64 with 128 tokens beside it, by quanto and by HQQ; its unquantized
``DynamicCache`` is shown, too.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, add_arguments
from benchmarks.real_model import MODEL_NAME, library_source, load_real_model, take_tokens
from benchmarks.timing import compare
from kvcache.hf import paged_cache
from moe_bitnet.errors import ConfigError

# A model of 8192 positions: the prompt leaves room for the tokens that are generated.
NUM_TOKENS, QUICK_TOKENS, CHUNK = 8000, 1024, 512
NUM_STEPS, QUICK_STEPS = 24, 4
FORMATS = {"FP16": (16, 16), "K8V8": (8, 8), "K4V4": (4, 4), "K2V2": (2, 2)}
BUDGET_BYTES = 512 << 20
GOAL = 5.0
MODEL_ALONE = "model alone"


class Generation:
    """One cache that has read the prompt; every call generates a token."""

    def __init__(self, model: Any, cache: Any, prompt_ids: Tensor, attention: str) -> None:
        self._model, self._cache, self._attention = model, cache, attention
        for chunk in prompt_ids.split(CHUNK):
            logits = self._forward(chunk)
        self._next_id = logits.argmax()

    def step(self) -> None:
        """Generate a token greedily."""
        self._next_id = self._forward(self._next_id[None]).argmax()

    def _forward(self, token_ids: Tensor) -> Tensor:
        self._model.set_attn_implementation(self._attention)
        output = self._model(token_ids[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        last: Tensor = output.logits[0, -1]
        return last


def make_caches(report: Report, model: Any) -> dict[str, Callable[[], tuple[Any, str]]]:
    """Return a maker of every cache and the attention that it needs, by name; absent peers are left out, and said."""
    from transformers import DynamicCache, QuantizedCache

    def paged(bits: tuple[int, int]) -> Callable[[], tuple[Any, str]]:
        return lambda: (paged_cache(model, BUDGET_BYTES, key_bits=bits[0], value_bits=bits[1]), "moe_bitnet_paged")

    makers: dict[str, Callable[[], tuple[Any, str]]] = {name: paged(bits) for name, bits in FORMATS.items()}
    makers["DynamicCache"] = lambda: (DynamicCache(config=model.config), "sdpa")
    for backend in ("quanto", "hqq"):
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        try:
            QuantizedCache(backend, model.config, nbits=4, q_group_size=64, residual_length=128, **axis)
        except ImportError as error:
            report.progress(f"left out {backend}: {error}")
            continue
        makers[f"QuantizedCache {backend}"] = lambda backend=backend, axis=axis: (
            QuantizedCache(backend, model.config, nbits=4, q_group_size=64, residual_length=128, **axis),
            "sdpa",
        )
    return makers


def measure(report: Report) -> None:
    """Fill all caches with one prompt and let them generate in turns."""
    model, tokenize = load_real_model()
    num_tokens = QUICK_TOKENS if report.is_quick else NUM_TOKENS
    prompt_ids = take_tokens(tokenize, library_source("tarfile.py"), num_tokens)
    with torch.inference_mode():
        runs = {}
        for name, make in make_caches(report, model).items():
            report.progress(f"{name}: reading {num_tokens} tokens")
            cache, attention = make()
            runs[name] = Generation(model, cache, prompt_ids, attention)
        turns = compare(
            {
                **{name: run.step for name, run in runs.items()},
                MODEL_ALONE: lambda: model(prompt_ids[:1][None], use_cache=False),
            },
            num_rounds=QUICK_STEPS if report.is_quick else NUM_STEPS,
            num_settling_calls=0,
            num_warmups=1,
            max_repeats=0,
        )
    for peer in (name for name in runs if name not in FORMATS):
        for name in FORMATS:
            report.add(
                "vs_hf_cache" if peer == "DynamicCache" else "vs_hf_quantized",
                turns.speedup(name, peer),
                "ratio",
                baseline=f"transformers {peer}, ms a token",
                baseline_value=turns[peer].median_s * 1e3,
                detail={
                    "format": name,
                    "model": MODEL_NAME,
                    "tokens": num_tokens,
                    "threads": torch.get_num_threads(),
                    "ms": turns[name].median_s * 1e3,
                    "other_cpu_share": turns[name].other_cpu_share,
                },
                at_least=GOAL if peer != "DynamicCache" and name != "FP16" else None,
            )
            alone_s = turns[MODEL_ALONE].median_s
            report.add(
                "cache_vs_hf_cache" if peer == "DynamicCache" else "cache_vs_hf_quantized",
                (turns[peer].median_s - alone_s) / (turns[name].median_s - alone_s),
                "ratio",
                baseline=f"transformers {peer}, ms a token beyond the model alone",
                baseline_value=(turns[peer].median_s - alone_s) * 1e3,
                detail={"format": name, "model": MODEL_NAME, "tokens": num_tokens, "model_alone_ms": alone_s * 1e3},
            )


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    with Report("paged_generate", arguments, extra_packages=("transformers",)) as report:
        try:
            measure(report)
        except ConfigError as error:
            report.add("vs_hf_quantized", None, "ratio", detail={"not_measured": str(error)})


if __name__ == "__main__":
    main()
