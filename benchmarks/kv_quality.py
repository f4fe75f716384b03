"""What quantized caches do to a real model, against a 16-bit cache and Hugging Face's: divergence, perplexity, needles.

    python -m benchmarks.kv_quality [--quick] [--json] [--output] [--tokens 6144] [--texts code prose]

SmolLM2-135M (``real_model.py`` says how to get it) reads a text in chunks of 64 tokens through all caches side by side,
so each token sees the pages of decoding. Ours keep the first 64 tokens and the last 128 to 191 in float16.
``QuantizedCache`` of transformers (quanto, 4 bits, groups of 64) keeps up to 128 of the last ones and then quantizes
its whole history again. Calibration uses other texts. Positions before the 512th are not compared: too few pages lie
before them.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, add_arguments
from benchmarks.real_model import MODEL_NAME, Tokenize, calibration_ids, load_real_model, test_ids
from kvcache.hf import calibrate
from kvcache.hf.evaluation import (
    CacheFormat,
    CacheQuality,
    cache_config,
    evaluate_caches,
    make_cache,
    text_with_needles,
    tokenize_needles,
)
from kvcache.moments import Moments
from kvcache.quality import LogitComparison, make_needles

NUM_TOKENS, NUM_CALIBRATION_TOKENS, NUM_NEEDLES = 6144, 8192, 16
NUM_SKIPPED = 512
LARGEST_KLD = {"K8V8": 0.00008, "K8V4": 0.0003, "K4V4": 0.002, "K4V2": 0.009, "K2V2": 0.05}
"""The goal of each calibrated format, in nats a token."""
LARGEST_PPL_CHANGE = {"K4V4": 0.003}
LARGEST_SHARE_OF_HF = {"K4V4": 0.25}
UNCALIBRATED = ("K8V8", "K4V4", "K2V2")
HF_INT4, HF_INT4_BITS = "HF int4", 4.5
_QUESTION_TOKENS = 256
_PROGRESS_EVERY = 512


def measure(report: Report, num_tokens: int, texts: list[str]) -> None:
    """Read each text with all caches."""
    model, tokenize = load_real_model()
    report.progress("calibrating")
    num_calibration_tokens = 1024 if report.is_quick else NUM_CALIBRATION_TOKENS
    moments = calibrate(model, torch.stack(calibration_ids(tokenize, num_calibration_tokens)))
    sources = test_ids(tokenize, num_tokens)
    for name in texts:
        _measure_text(report, model, tokenize, sources[name], name, moments)


def _measure_text(
    report: Report, model: Any, tokenize: Tokenize, text_ids: Tensor, text: str, moments: Moments
) -> None:
    needles = tokenize_needles(make_needles(2 if report.is_quick else NUM_NEEDLES), tokenize)
    token_ids = text_with_needles(text_ids, needles, len(text_ids))
    max_tokens = len(token_ids) + _QUESTION_TOKENS
    formats = ("K8V8", "K4V4") if report.is_quick else tuple(LARGEST_KLD)
    caches: dict[str, Any] = {name: make_cache(model, _bits(name), max_tokens, moments) for name in formats}
    for name in () if report.is_quick else UNCALIBRATED:
        caches[f"{name} plain"] = make_cache(model, _bits(name), max_tokens, None)
    caches |= _hf_caches(report, model)
    qualities = evaluate_caches(
        model,
        token_ids,
        needles,
        make_cache(model, CacheFormat(16, 16), max_tokens, None),
        caches,
        num_skipped=min(NUM_SKIPPED, len(token_ids) // 2),
        on_chunk=partial(_say_progress, report, text),
    )
    hf_int4 = qualities.get(HF_INT4)
    for name, quality in qualities.items():
        effective_bits = HF_INT4_BITS if name == HF_INT4 else cache_config(model, _bits(name)).effective_bits
        detail = {"format": name, "bits": effective_bits, "text": text, "tokens": len(token_ids)}
        _report(report, name, quality, detail)
        if hf_int4 is not None and name != HF_INT4:
            _report_against_hf(report, name, quality, hf_int4, detail)


def _hf_caches(report: Report, model: Any) -> dict[str, Any]:
    """Return transformers' own quantized cache, unless its backend is missing."""
    from transformers import QuantizedCache

    try:
        settings = {"nbits": 4, "q_group_size": 64, "residual_length": 128}
        return {HF_INT4: QuantizedCache("quanto", model.config, **settings)}
    except ImportError as error:
        report.progress(f"left out {HF_INT4}: {error}")
        return {}


def _report(report: Report, name: str, quality: CacheQuality, detail: Mapping[str, Any]) -> None:
    logits, retrieval = quality.logits, quality.retrieval
    report.add(
        "kld_mean",
        logits.kld_mean,
        "nats",
        detail={
            **detail,
            "standard_error": logits.kld_standard_error,
            "median": logits.kld_median,
            "positions": logits.num_tokens,
            "model": MODEL_NAME,
        },
        at_most=LARGEST_KLD.get(name),
    )
    report.add("kld_p999", logits.kld_p999, "nats", detail=detail)
    report.add("top1_agreement", logits.top1_agreement, "ratio", detail=detail)
    report.add(
        "ppl_change",
        logits.ppl_change,
        "ratio",
        baseline="16-bit cache, PPL",
        baseline_value=logits.reference_ppl,
        detail={**detail, "ppl": logits.ppl},
        at_most=LARGEST_PPL_CHANGE.get(name),
    )
    if retrieval is not None:
        report.add(
            "needles_found",
            retrieval.num_found,
            "needles",
            baseline="16-bit cache",
            baseline_value=retrieval.num_reference_found,
            detail={**detail, "needles": asdict(retrieval)},
        )


def _report_against_hf(
    report: Report, name: str, quality: CacheQuality, hf_int4: CacheQuality, detail: Mapping[str, Any]
) -> None:
    report.add(
        "kld_vs_hf_int4",
        quality.logits.kld_mean / hf_int4.logits.kld_mean,
        "ratio",
        baseline="transformers QuantizedCache, quanto int4 g64, KLD",
        baseline_value=hf_int4.logits.kld_mean,
        detail=detail,
        at_most=LARGEST_SHARE_OF_HF.get(name),
    )


def _bits(name: str) -> CacheFormat:
    """Return the bits of ``K4V2`` or ``K4V2 plain``."""
    return CacheFormat(int(name[1]), int(name[3]))


def _say_progress(report: Report, text: str, done: int, comparisons: Mapping[str, LogitComparison]) -> None:
    if done % _PROGRESS_EVERY == 0:
        means = {name: comparison.kld_mean for name, comparison in comparisons.items()}
        known = ", ".join(f"{name} {mean:.6f}" for name, mean in means.items() if mean is not None)
        report.progress(f"{text}, {done} tokens: KLD {known}")


def main() -> None:
    """Measure all caches and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, help=f"length of a text (default: {NUM_TOKENS}; --quick: 1024)")
    parser.add_argument("--texts", nargs="+", choices=("code", "prose"), help="which (default: both; --quick: code)")
    arguments = parser.parse_args()
    with Report("kv_quality", arguments, extra_packages=("transformers", "optimum-quanto")) as report:
        texts = arguments.texts or (["code"] if report.is_quick else ["code", "prose"])
        measure(report, arguments.tokens or (1024 if report.is_quick else NUM_TOKENS), texts)


if __name__ == "__main__":
    main()
