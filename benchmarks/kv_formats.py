"""How well formats keep real keys and values: signal to error, error of attention outputs, divergence of the logits.

    python -m benchmarks.kv_formats [--quick] [--json] [--output] [--tokens 2048] [--only NAME ...]

SmolLM2-135M (``real_model.py`` says how to get it) reads source code; keys and values that are behind the sinks (64
tokens) and out of the window (128) are replaced by what a format gives back, in all layers, as in decoding page by page
(``masked_attention.py``). Formats: plain integers, those of llama.cpp, KIVI and Hugging Face, and ours, step by step.
Figures of one text: differences of a few per cent between two formats are chance.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cache_formats import (
    NamedFormat,
    alike_format,
    asymmetric,
    centred_format,
    ggml_q4_0,
    paged_format,
    plane_format,
    rotated,
    short_format,
    symmetric,
    trellis,
    unsegmented_format,
)
from benchmarks.harness import Report, add_arguments
from benchmarks.masked_attention import Errors, masked_attention
from benchmarks.real_model import MODEL_NAME, calibration_ids, load_real_model, test_ids
from kvcache.config import KVCacheConfig
from kvcache.hf.calibrate import calibrate
from kvcache.hf.support import attention_shape
from kvcache.moments import Moments
from kvcache.quality import LogitComparison, LogitQuality
from moe_bitnet.errors import ConfigError

NUM_TOKENS, NUM_CALIBRATION_TOKENS = 2048, 8192
NUM_SKIPPED = 512
QUICK_NAMES = ("int4, asymmetric g64 (Hugging Face)", "K4V4")
_LOGIT_ROWS = 256


def formats(config: Callable[[int, int], KVCacheConfig], moments: Moments) -> Iterator[NamedFormat]:
    """Yield all formats, those of equal bits together."""
    head_dim = config(8, 8).head_dim
    yield plane_format("int8 per token", _per_token(8, head_dim), symmetric(8, head_dim), symmetric(8, head_dim))
    yield paged_format("K8V8 plain", config(8, 8), None)
    yield paged_format("K8V8", config(8, 8), moments)
    yield plane_format("q4_0 (llama.cpp)", (4.5, 4.5), ggml_q4_0, ggml_q4_0)
    for num_bits in (4, 2):
        yield from _others(num_bits, head_dim)
        yield from _steps(num_bits, config, moments)
    for key_bits, value_bits in ((8, 4), (8, 2), (4, 2), (16, 8), (8, 16), (16, 4), (4, 16), (16, 2), (2, 16)):
        yield paged_format(f"K{key_bits}V{value_bits}", config(key_bits, value_bits), moments)


def _others(num_bits: int, head_dim: int) -> Iterator[NamedFormat]:
    per_token = symmetric(num_bits, head_dim)
    yield plane_format(f"int{num_bits} per token", _per_token(num_bits, head_dim), per_token, per_token)
    grouped = asymmetric(num_bits, head_dim)
    bits = num_bits + 32 / head_dim
    yield plane_format(f"int{num_bits}, asymmetric g{head_dim} (Hugging Face)", (bits, bits), grouped, grouped)
    kivi = (asymmetric(num_bits, 32, is_per_channel=True), asymmetric(num_bits, 32))
    yield plane_format(f"KIVI-like {num_bits} bits g32", (num_bits + 1.0, num_bits + 1.0), *kivi)


def _steps(num_bits: int, config: Callable[[int, int], KVCacheConfig], moments: Moments) -> Iterator[NamedFormat]:
    """Yield our format at equal bits, one idea after the other."""
    sizes = config(num_bits, num_bits)
    rotation = rotated(symmetric(num_bits, sizes.head_dim))
    yield plane_format(f"rotated int{num_bits} per token", _per_token(num_bits, sizes.head_dim), rotation, rotation)
    coded = (rotated(trellis(num_bits, is_along_tokens=False)), rotated(trellis(num_bits, is_along_tokens=True)))
    bits = num_bits + 8 / sizes.head_dim
    yield plane_format(f"rotated, {num_bits}-bit trellis", (bits, bits), *coded)
    name = f"K{num_bits}V{num_bits}"
    yield paged_format(f"{name} plain: with scale search", sizes, None)
    yield centred_format(f"{name} plain, centred", sizes, moments)
    yield unsegmented_format(f"{name} calibrated, without segments", sizes, moments)
    yield short_format(f"{name} calibrated, not lengthened", sizes, moments)
    yield alike_format(f"{name} calibrated, all tokens alike", sizes, moments)
    yield paged_format(name, sizes, moments)


def _per_token(num_bits: int, head_dim: int) -> tuple[float, float]:
    bits = num_bits + 16 / head_dim
    return bits, bits


def measure(report: Report, num_tokens: int, names: tuple[str, ...]) -> None:
    """Run every format over the same text."""
    model, tokenize = load_real_model()
    num_calibration_tokens = 1024 if report.is_quick else NUM_CALIBRATION_TOKENS
    moments = calibrate(model, torch.stack(calibration_ids(tokenize, num_calibration_tokens)))
    token_ids = test_ids(tokenize, num_tokens)["code"]
    shape = attention_shape(model)

    def config(key_bits: int, value_bits: int) -> KVCacheConfig:
        return KVCacheConfig(shape.num_layers, shape.num_kv_heads, shape.head_dim, key_bits, value_bits)

    candidates = [each for each in formats(config, moments) if not names or each.name in names]
    if not candidates:
        raise ConfigError(f"kv_formats: no format is called {names}. Leave --only out to see the names.")
    with masked_attention(model) as attention, torch.inference_mode():
        reference = _hidden_states(model, token_ids)
        for candidate in candidates:
            attention.quantize, attention.errors = candidate.quantize, Errors()
            hidden_states = _hidden_states(model, token_ids)
            quality = _compare(model, reference, hidden_states, token_ids)
            _report(report, candidate, quality, attention.errors, num_tokens)


def _hidden_states(model: Any, token_ids: Tensor) -> Tensor:
    hidden_states: Tensor = model.get_decoder()(token_ids.unsqueeze(0), use_cache=False).last_hidden_state
    return hidden_states[0]


def _compare(model: Any, reference: Tensor, hidden_states: Tensor, token_ids: Tensor) -> LogitQuality:
    comparison = LogitComparison()
    head = model.get_output_embeddings()
    for start in range(min(NUM_SKIPPED, len(token_ids) // 2), len(token_ids) - 1, _LOGIT_ROWS):
        end = min(start + _LOGIT_ROWS, len(token_ids) - 1)
        comparison.add(head(reference[start:end]), head(hidden_states[start:end]), token_ids[start + 1 : end + 1])
    return comparison.result()


def _report(report: Report, candidate: NamedFormat, quality: LogitQuality, errors: Errors, num_tokens: int) -> None:
    detail = {
        "format": candidate.name,
        "key_bits": candidate.key_bits,
        "value_bits": candidate.value_bits,
        "tokens": num_tokens,
    }
    report.progress(f"{candidate.name}: KLD {quality.kld_mean:.6f}")
    report.add(
        "kld_mean",
        quality.kld_mean,
        "nats",
        detail={
            **detail,
            "standard_error": quality.kld_standard_error,
            "median": quality.kld_median,
            "p999": quality.kld_p999,
            "top1": quality.top1_agreement,
            "ppl": quality.ppl,
            "ppl_fp16": quality.reference_ppl,
            "model": MODEL_NAME,
        },
    )
    report.add("attention_error", errors.output_error / errors.output_signal, "ratio", detail=detail)
    for name, signal, error in (
        ("key_snr", errors.key_signal, errors.key_error),
        ("value_snr", errors.value_signal, errors.value_error),
    ):
        if error > 0:  # nothing is lost at 16 bits but what float16 rounds
            report.add(name, _decibels(signal / error), "dB", detail=detail)


def _decibels(ratio: float) -> float:
    return float(10 * torch.tensor(ratio, dtype=torch.float64).log10())


def main() -> None:
    """Measure all formats and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, help=f"length of the text (default: {NUM_TOKENS}; --quick: 1024)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these formats alone, such as K4V4")
    arguments = parser.parse_args()
    with Report("kv_formats", arguments, extra_packages=("transformers",)) as report:
        names = tuple(arguments.only) or (QUICK_NAMES if report.is_quick else ())
        measure(report, arguments.tokens or (1024 if report.is_quick else NUM_TOKENS), names)


if __name__ == "__main__":
    main()
