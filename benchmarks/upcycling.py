"""What a dense model loses and gains when it becomes a ternary mixture: before, after, and along continued training.

    python -m benchmarks.upcycling [--quick] [--json] [--output] [--minutes 15] [--steps N] [--prose DIR]

SmolLM2-135M (``real_model.py`` says how to get it) becomes a mixture by both recipes of ``moe-bitnet upcycle`` and goes
on training on the standard library's sources and English prose (``prose.py``), half of each. Perplexities are taken on
documents of both kinds that were not trained on, beside those of the dense model, of the dense model trained on the
same batches, and of the dense model rounded to ternary without more ado. Some hundred steps on two cores are no
training: they show that a recipe starts where it should, and which way it goes. ``--quick`` takes a tiny LLaMA with
random weights instead.
"""

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, add_arguments
from benchmarks.prose import prose_documents
from benchmarks.real_model import MODEL_NAME, load_model_and_tokenizer
from benchmarks.upcycling_plot import plot_upcycling
from benchmarks.upcycling_run import Course, Perplexities, Point, Text, make_text, measure, rounded, train_on
from cluster.training.corpus import collect_documents
from cluster.training.document import Document, sample_documents
from moe_bitnet.checkpoint.stored_bytes import stored_forms
from moe_bitnet.checkpoint.upcycle import UpcycleSettings, upcycle
from moe_bitnet.checkpoint.upcycle_source import dense_model
from moe_bitnet.checkpoint.upcycle_statistics import LayerStatistics, collect_statistics
from moe_bitnet.model import MoETransformer
from moe_bitnet.tokenizer import Tokenizer

RECIPES: dict[str, UpcycleSettings] = {
    # a quarter of the dense width each: an expert's share of a step's time is small beside the frozen model's
    "mote": UpcycleSettings("mote", num_experts=4, top_k=1, expert_width=384),
    "ternary": UpcycleSettings("ternary", num_experts=2, top_k=1),
}
PEAK_LEARNING_RATES = {"mote": 1e-3, "ternary": 1e-3, "dense_trained": 1e-4}
"""Taken, not tuned: new and rounded weights want more than those of a trained model."""
LARGEST_CHANGE = 1e-3
"""Of a perplexity when a mote model is made of a dense one, relative."""
_TRAINED_SHARE = 0.8  # of the minutes; evaluations of other models take the rest
_TEXT_BYTES = 6_000_000  # of each kind: more than is trained on


@dataclass(frozen=True)
class Sizes:
    """How much is read.

    Attributes:
        seq_len: tokens of a sequence.
        batch_size: sequences a step.
        num_windows: of validation, of each kind of text.
        num_calibration: sequences to calibrate with, of each kind of text.
        num_points: evaluations along the training.
    """

    seq_len: int
    batch_size: int
    num_windows: int
    num_calibration: int
    num_points: int


FULL = Sizes(seq_len=256, batch_size=2, num_windows=8, num_calibration=8, num_points=5)
QUICK = Sizes(seq_len=32, batch_size=4, num_windows=4, num_calibration=2, num_points=2)


def main() -> None:
    """Convert, train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=20.0, help="about as long as this at most (default: 20)")
    parser.add_argument("--steps", type=int, default=80, help="of training a model, 512 tokens each (default: 80)")
    parser.add_argument("--prose", type=Path, help="folder of English text (default: what this machine has)")
    arguments = parser.parse_args()
    with Report("upcycling", arguments, ("transformers",)) as report:
        if report.is_quick:
            report.progress("a tiny LLaMA with random weights stands for the real model")
            run_quick(report)
        else:
            run_full(report, arguments.prose, arguments.steps, 60 * arguments.minutes)
    if report.output_path is not None:
        plot_upcycling(report.metrics, report.output_path.with_suffix(".png"))


def run_full(report: Report, prose: Path | None, num_steps: int, max_s: float) -> None:
    """Measure SmolLM2."""
    documents = {
        "code": sample_documents(collect_documents().documents, _TEXT_BYTES),
        "prose": sample_documents(prose_documents(prose), _TEXT_BYTES),
    }
    report.progress("loading the model")
    llama, their_tokenizer = load_model_and_tokenizer()
    dense = dense_model(llama.config.to_dict(), llama.state_dict(), MODEL_NAME)
    tokenizer = Tokenizer.from_json(their_tokenizer.backend_tokenizer.to_str())
    max_s_each = _TRAINED_SHARE * max_s / (len(RECIPES) + 1)
    run(report, dense, MODEL_NAME, documents, tokenizer, FULL, RECIPES, num_steps, max_s_each)


def run_quick(report: Report) -> None:
    """Walk the same way with a model that knows nothing."""
    from pydoc_data.topics import topics

    from transformers import LlamaConfig, LlamaForCausalLM

    documents = {
        "code": list(collect_documents(max_bytes=300_000, max_document_bytes=16_384).documents),
        "prose": [Document(name, text) for name, text in sorted(topics.items())],
    }
    tokenizer = Tokenizer.train((each.text for kind in documents.values() for each in kind), 512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    dense = dense_model(config.to_dict(), LlamaForCausalLM(config).state_dict(), "a tiny LLaMA")
    recipes = {
        "mote": UpcycleSettings("mote", num_experts=4, top_k=1, expert_width=32),
        "ternary": UpcycleSettings("ternary", num_experts=2, top_k=1),
    }
    run(report, dense, "a tiny LLaMA with random weights", documents, tokenizer, QUICK, recipes, 20, 10.0)


def run(
    report: Report,
    dense: MoETransformer,
    source: str,
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    sizes: Sizes,
    recipes: Mapping[str, UpcycleSettings],
    num_steps: int,
    max_s: float,
) -> None:
    """Measure the dense model, its rounded form, itself trained on, and what both recipes make of it.

    Args:
        report: takes the metrics.
        dense: the model, as ours.
        source: what it is, in words.
        documents: by kind of text.
        tokenizer: of the model.
        sizes: how much is read.
        recipes: by name.
        num_steps: of training, for each model.
        max_s: seconds of training and its evaluations, for each model.
    """
    report.progress("tokenizing")
    texts = {name: make_text(kind, tokenizer, sizes.seq_len, sizes.num_windows) for name, kind in documents.items()}
    report.progress("the dense model")
    before = measure(dense, texts)
    _report_ppl(report, source, "dense", before, before)
    _report_bytes(report, "dense", dense, dense)
    report.progress("the dense model, rounded")
    _report_ppl(report, source, "rounded", measure(rounded(dense), texts), before)
    statistics = _statistics(dense, texts, sizes)
    courses = {
        name: Course(
            num_steps,
            sizes.batch_size,
            sizes.seq_len,
            rate,
            sizes.num_points,
            max_s,
            has_frozen_backbone=name == "mote",
        )
        for name, rate in PEAK_LEARNING_RATES.items()
    }
    report.progress("the dense model, trained on")
    twin = _train(report, source, "dense_trained", copy.deepcopy(dense), texts, courses["dense_trained"], before)
    for name, settings in recipes.items():
        _run_recipe(report, source, name, settings, dense, statistics, texts, courses[name], before, twin)


def _run_recipe(
    report: Report,
    source: str,
    name: str,
    settings: UpcycleSettings,
    dense: MoETransformer,
    statistics: Sequence[LayerStatistics],
    texts: Mapping[str, Text],
    course: Course,
    before: Perplexities,
    twin: Point,
) -> None:
    report.progress(f"recipe {name}")
    torch.manual_seed(settings.seed)
    model = upcycle(dense, settings, statistics)
    after = measure(model, texts)
    _report_ppl(report, source, name, after, before)
    _report_bytes(report, name, model, dense)
    if settings.recipe == "mote":
        change = max(abs(after[text] / before[text] - 1) for text in texts)
        report.add("change_at_conversion", change, "ratio", detail={"model": name}, at_most=LARGEST_CHANGE)
    point = _train(report, source, name, model, texts, course, before)
    if settings.recipe == "mote":
        detail = {"model": name, "tokens": point.num_tokens, "note": "the dense model was not trained on these texts"}
        ratio = _worst_ratio(point.perplexities, before)
        report.add("ppl_vs_dense", ratio, "ratio", baseline="the dense model", detail=detail, at_most=1.0)
    detail = {"model": name, "tokens": point.num_tokens, "tokens_of_dense": twin.num_tokens}
    ratio = _worst_ratio(point.perplexities, twin.perplexities)
    report.add("ppl_vs_dense_trained", ratio, "ratio", baseline="the dense model, trained on", detail=detail)


def _worst_ratio(perplexities: Perplexities, baseline: Perplexities) -> float:
    return max(perplexities[text] / baseline[text] for text in baseline)


def _train(
    report: Report,
    source: str,
    name: str,
    model: MoETransformer,
    texts: Mapping[str, Text],
    course: Course,
    before: Perplexities,
) -> Point:
    """Train a model on, and report it along the way; returns the last evaluation."""

    def report_point(point: Point) -> None:
        detail = {
            "tokens": point.num_tokens,
            "steps": point.step,
            "train_s": round(point.train_s, 1),
            "largest_load": round(point.largest_load, 3),
            "learning_rate": course.peak_learning_rate,
        }
        _report_ppl(report, source, name, point.perplexities, before, **detail)
        report.progress(f"{name}: {point.num_tokens} tokens, PPL {_shown(point.perplexities)}")

    point = train_on(model, texts, course, report_point)
    report.add("train_tokens_per_s", point.num_tokens / point.train_s, "1/s", detail={"model": name})
    return point


def _statistics(dense: MoETransformer, texts: Mapping[str, Text], sizes: Sizes) -> list[LayerStatistics]:
    report_len = sizes.num_calibration * sizes.seq_len
    rows = [torch.from_numpy(text.train[:report_len]).long().view(-1, sizes.seq_len) for text in texts.values()]
    return collect_statistics(dense, torch.cat(rows))


def _report_ppl(
    report: Report, source: str, model: str, perplexities: Perplexities, before: Perplexities, **detail: Any
) -> None:
    for text, value in perplexities.items():
        report.add(
            "ppl",
            value if math.isfinite(value) else None,
            "PPL",
            baseline="the dense model",
            baseline_value=before[text],
            detail={"model": model, "text": text, "tokens": 0, "source": source, **detail},
        )


def _report_bytes(report: Report, name: str, model: MoETransformer, dense: MoETransformer) -> None:
    (dense_bytes,) = stored_forms(dense.config).values()
    for form, num_bytes in stored_forms(model.config).items():
        report.add(
            "stored_bytes",
            num_bytes,
            "bytes",
            baseline="the dense model, FP16",
            baseline_value=dense_bytes,
            detail={"model": name, "form": form, "experts": model.config.num_experts, "top_k": model.config.top_k},
        )


def _shown(perplexities: Perplexities) -> str:
    return ", ".join(f"{value:.4g} on {text}" for text, value in perplexities.items())


if __name__ == "__main__":
    main()
