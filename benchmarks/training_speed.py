"""How fast does a model train: tokens per CPU second, ternary against its float twin, expert against data parallel.

    python -m benchmarks.training_speed

The shape has 21 million parameters, 7.8 million active: 6 blocks of 256 values, 8 experts of 512, top 2, a vocabulary
of 4,096; steps of 8 sequences of 256 tokens; compiled bfloat16. One process with one thread takes turns between the
precisions; two processes with one thread each take turns between data-parallel and expert-parallel steps of the
same global batch (both through DeepSpeed, ZeRO 1, gloo), and meter the bytes that tokens travel beside their formula.
``--quick`` takes a few steps without compiling, whose times say nothing: compiling takes most of a minute for each
model.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.disturbance import other_cpu_share, read_cpu_times
from benchmarks.harness import Report, add_arguments
from benchmarks.training_speed_plot import plot_training_speed
from benchmarks.training_steps import SHAPE, Turns, stepper, take_turns, train_config
from benchmarks.training_workers import time_workers
from cluster.training.compilation import compile_blocks
from cluster.training.engine import TorchEngine
from moe_bitnet.config import Precision
from moe_bitnet.model import MoETransformer

BATCH_SIZE, SEQ_LEN = 8, 256
NUM_WORKERS = 2
_NUM_WARM = 3
_PRECISIONS: tuple[Precision, ...] = ("ternary", "float", "int4-experts", "binary")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    with Report("training_speed", arguments, ("deepspeed",)) as report:
        num_turns = 3 if report.is_quick else 25
        measure_precisions(report, _PRECISIONS[:2] if report.is_quick else _PRECISIONS, num_turns)
        measure_workers(report, num_turns)
    if report.output_path is not None:
        plot_training_speed(report.metrics, report.output_path.with_suffix(".png"))


def measure_precisions(report: Report, precisions: Sequence[Precision], num_turns: int) -> None:
    """Time one process's steps of each precision in turns."""
    report.progress(f"{', '.join(precisions)}: {_NUM_WARM} steps each to compile and settle, then {num_turns}")
    torch.set_num_threads(1)
    before = read_cpu_times()
    steps = {precision: _single(precision, not report.is_quick) for precision in precisions}
    turns = take_turns(steps, num_turns, _NUM_WARM)
    others = other_cpu_share(before, read_cpu_times())
    tokens = BATCH_SIZE * SEQ_LEN
    shape = {"tokens_per_step": tokens, "threads": 1, "dtype": "bfloat16", "other_cpu_share": others}
    for precision in precisions:
        report.add(
            "tokens_per_cpu_s",
            tokens / statistics.median(turns.cpu_s[precision]),
            "1/s",
            detail={**shape, "precision": precision, "parameters": _num_parameters(), **_spread(turns, precision)},
            at_least=_goal(report, 2700) if precision == "ternary" else None,
        )
    for precision in precisions:
        if precision != "float":
            report.add(
                "ternary_vs_twin_step" if precision == "ternary" else "other_vs_twin_step",
                statistics.median(turns.ratios(precision, "float")),
                "ratio",
                baseline="float twin, seconds a step",
                baseline_value=statistics.median(turns.wall_s["float"]),
                detail={**shape, "precision": precision},
                at_most=_goal(report, 1.15) if precision == "ternary" else None,
            )


def measure_workers(report: Report, num_turns: int) -> None:
    """Time data-parallel and expert-parallel steps of two workers, and compare their bytes with the formula."""
    report.progress(f"{NUM_WORKERS} workers: {_NUM_WARM} steps each way to compile and settle, then {num_turns}")
    before = read_cpu_times()
    times = time_workers(NUM_WORKERS, BATCH_SIZE, SEQ_LEN, num_turns, not report.is_quick)
    others = other_cpu_share(before, read_cpu_times())
    ratios = [expert / data for expert, data in zip(times.expert_parallel_s, times.data_parallel_s, strict=True)]
    detail = {
        "workers": NUM_WORKERS,
        "zero_stage": 1,
        "exchange_dtype": "bfloat16",
        "tokens_per_step": BATCH_SIZE * SEQ_LEN,
        "other_cpu_share": others,
    }
    report.add(
        "ep_vs_dp_step",
        statistics.median(ratios),
        "ratio",
        baseline="data-parallel step, s",
        baseline_value=statistics.median(times.data_parallel_s),
        detail={**detail, "p10": _quantile(ratios, 1), "p90": _quantile(ratios, 9)},
        at_most=_goal(report, 1.2),
    )
    report.add(
        "dispatch_bytes_vs_formula",
        times.dispatch_bytes / times.formula_bytes,
        "ratio",
        baseline="formula for uniform routing, bytes a step",
        baseline_value=times.formula_bytes,
        detail={**detail, "bytes_per_step": times.dispatch_bytes},
        at_least=0.98,
    )


def _goal(report: Report, value: float) -> float | None:
    """Return a goal of time, unless steps were not compiled."""
    return None if report.is_quick else value


def _single(precision: Precision, is_compiled: bool) -> Callable[[int], object]:
    config = train_config(BATCH_SIZE, SEQ_LEN)
    torch.manual_seed(0)
    model = MoETransformer(SHAPE.replace(precision=precision))
    is_compiled = is_compiled and compile_blocks(model, config.compute_dtype)
    return stepper(TorchEngine(model, config, is_compiled), config, SHAPE.vocab_size, is_compiled)


def _num_parameters() -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MoETransformer(SHAPE).parameters())


def _spread(turns: Turns, name: str) -> dict[str, float]:
    return {
        "median_step_s": statistics.median(turns.wall_s[name]),
        "p10_s": _quantile(turns.wall_s[name], 1),
        "p90_s": _quantile(turns.wall_s[name], 9),
    }


def _quantile(values: Sequence[float], tenth: int) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[tenth - 1]


if __name__ == "__main__":
    main()
