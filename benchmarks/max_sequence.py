"""How many tokens fit into a byte budget: FP16 against every cache format, really filled, by peak resident memory.

    python -m benchmarks.max_sequence [--quick] [--json] [--output]

Every cache is filled to its last token in a process of its own (``sequence_fill.py`` says how, and what its peak
counts); one token more is refused. ``multiple`` compares tokens a byte of that peak with FP16's. Shapes: SmolLM2-135M
(the real model where ``MOE_BITNET_SMOLLM2`` names it, else random weights; ``weights`` in the detail says which), this
project's ternary mixture of experts in the demo's shape, and LLaMA-3-8B's attention without its weights. Small budgets
are filled by prefill through the whole model, large ones by storing random keys and values without attention; ``fill``
says which. In both the last tokens are decoded.

Every sequence keeps 320 tokens of float16 pages (sinks, window, and pages that are being sealed), whatever its format:
where FP16 holds only a few thousand tokens, that lowers the multiple.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.capacity_plot import plot_capacity
from benchmarks.harness import Report, add_arguments
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS

BASELINE = "FP16"
GOALS = {"K8V8": 1.9, "K4V4": 3.7, "K2V2": 6.8}
_MIB = 2**20
_MAIN_FORMATS = (BASELINE, *GOALS)
# Large results are mapped, and unmapped when they are freed: then the peak counts what is in use.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A model with a budget.

    Attributes:
        model: a key of ``sequence_models.SUBJECTS``.
        budget_mib: of the cache, in 2**20 bytes.
        fill: one of ``sequence_fill.FILLS``.
        formats: keys of ``CACHE_FORMATS``, FP16 among them.
    """

    model: str
    budget_mib: int
    fill: str
    formats: tuple[str, ...] = tuple(CACHE_FORMATS)


CASES = (
    Case("smollm2-135m", 64, "prefill"),
    Case("smollm2-135m", 256, "stored"),
    Case("ternary-moe-demo", 16, "prefill", _MAIN_FORMATS),
    Case("ternary-moe-demo", 64, "stored", _MAIN_FORMATS),
    Case("llama-3-8b", 256, "stored", _MAIN_FORMATS),
    Case("llama-3-8b", 1024, "stored", _MAIN_FORMATS),
)
QUICK_CASES = (
    Case("ternary-moe-demo", 4, "prefill", _MAIN_FORMATS),
    Case("ternary-moe-demo", 32, "stored", _MAIN_FORMATS),
)


def measure(report: Report, case: Case) -> None:
    """Fill a cache of each format and compare with the first."""
    results: dict[str, dict[str, Any]] = {}
    for name in case.formats:
        report.progress(f"{case.model}, {case.budget_mib} MiB, {name}, {case.fill}")
        result = results[name] = _fill(case, name)
        detail = {
            "format": name,
            "model": case.model,
            "budget_mib": case.budget_mib,
            "fill": case.fill,
            "effective_bits": result["effective_bits"],
            "weights": result["weights"],
        }
        times = {key: result[key] for key in ("fill_s", "decode_token_s", "threads")}
        report.add("tokens", result["tokens"], "tokens", detail={**detail, **times})
        report.add(
            "peak_bytes",
            result["peak_bytes"],
            "bytes",
            baseline="allocated by the cache",
            baseline_value=result["allocated_bytes"],
            detail=detail,
        )
        if name != BASELINE:
            fp16 = results[BASELINE]
            report.add(
                "multiple",
                _density(result) / _density(fp16),
                "ratio",
                baseline="FP16, tokens",
                baseline_value=fp16["tokens"],
                detail={**detail, "tokens": result["tokens"], "tokens_multiple": result["tokens"] / fp16["tokens"]},
                at_least=None if report.is_quick else GOALS.get(name),
            )


def _density(result: dict[str, Any]) -> float:
    """Return tokens a byte of peak memory."""
    return float(result["tokens"] / result["peak_bytes"])


def _fill(case: Case, format_name: str) -> dict[str, Any]:
    """Fill one cache in a process of its own."""
    options = ("--model", case.model, "--format", format_name, "--budget", f"{case.budget_mib}MiB", "--fill", case.fill)
    command = [sys.executable, "-m", "benchmarks.sequence_fill", *options]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ENVIRONMENT})
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {answer.returncode}:\n{answer.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    models = sorted({case.model for case in CASES})
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="which (default: all)")
    arguments = parser.parse_args()
    with Report("max_sequence", arguments, extra_packages=("transformers",)) as report:
        for case in QUICK_CASES if report.is_quick else CASES:
            if case.model in arguments.models:
                measure(report, case)
        if report.output_path is not None:
            plot_capacity(report.metrics, report.output_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
