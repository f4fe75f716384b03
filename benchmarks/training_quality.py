"""Does a ternary mixture match its FP16 twin, and beat FP16 and int4 experts at equal bytes? Trained, at three sizes.

    python -m benchmarks.training_quality [--folder DIR] [--prose DIR] [--steps N] [--jobs N]

Ternary, float and int4-experts models of 1.1, 4.5 and 12.0 million active parameters (8 experts, top 2, the same
sub-norms, the same batches in the same order) read the standard library's sources; the smallest also English prose.
Every precision has the best peak learning rate of its own sweep (``training_plan``). The whole table takes about four
hours on two idle cores; what is finished stays in the folder, and the same command goes on after an interruption
(``--finished`` reports without going on).
``--quick`` trains two very small shapes for some steps in less than a minute: it shows that everything works.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Report, add_arguments
from benchmarks.prose import prose_documents
from benchmarks.training_cells import Plan, Results, read_finished, run_cells
from benchmarks.training_plan import (
    COMPARED,
    SIZES,
    TRAINED,
    VOCAB_SIZE,
    Cell,
    Corpus,
    best_rate,
    plan,
)
from benchmarks.training_plots import plot_training_quality
from benchmarks.training_table import (
    BestRate,
    Entry,
    at_bytes,
    competitors,
    gather,
    ratio_to_twin,
    seed_ratios,
    select,
)
from cluster.training.corpus import collect_documents
from cluster.training.document import Document
from cluster.training.shards import build_shards, read_summary, split_documents, train_tokenizer
from moe_bitnet.config import Precision
from moe_bitnet.errors import DataError

DEFAULT_FOLDER = Path("runs/training_quality")
DEFAULT_STEPS = 3000
_VALIDATION_FRACTION = 0.05
_QUICK_STEPS = 25
_QUICK_BYTES = 1_200_000
_QUICK_RATE = 1e-2
_GAP_METRIC = "ppl_vs_twin"


def main() -> None:
    """Train what is missing, and print what the table says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help=f"keeps the runs (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument("--prose", type=Path, help="folder of English text (default: what this machine has)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help=f"of a run, 1,024 tokens each (default: {DEFAULT_STEPS})"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one a core)")
    parser.add_argument("--finished", action="store_true", help="report the runs that are finished; train nothing")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        report = stack.enter_context(Report("training_quality", arguments))
        if report.is_quick:
            arguments.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _build_data("code", lambda: collect_documents([], max_bytes=_QUICK_BYTES).documents, arguments.folder)
            results = run_cells(_plan_quick, arguments.folder, arguments.jobs, True, report.progress)
            _report(report, gather(results, lambda *_: _QUICK_RATE), _QUICK_SIZES)
            return
        steps = arguments.steps
        this_plan: Plan = lambda losses: plan(losses, steps)  # noqa: E731 - steps belong to the plan
        if arguments.finished:
            results = read_finished(this_plan, arguments.folder)
        else:
            _build_data("code", lambda: collect_documents([]).documents, arguments.folder)
            _build_data("prose", lambda: prose_documents(arguments.prose), arguments.folder)
            results = run_cells(this_plan, arguments.folder, arguments.jobs, False, report.progress)
        losses = {cell: float(result["validation_loss"]) for cell, result in results.items()}
        best: BestRate = lambda *model: best_rate(losses, *model, steps)  # noqa: E731
        _report_hours(report, results)
        _report_sweeps(report, results, best)
        _report(report, gather(results, best), SIZES)
    if report.output_path is not None:
        plot_training_quality(report.metrics, report.output_path.with_suffix(".png"))


_QUICK_SIZES = ("quick", "quick-wide")


def _plan_quick(losses: object) -> list[Cell]:
    return [
        Cell("code", size, precision, _QUICK_RATE, 0, _QUICK_STEPS) for size in _QUICK_SIZES for precision in COMPARED
    ]


def _build_data(corpus: Corpus, documents: Callable[[], "list[Document] | tuple[Document, ...]"], folder: Path) -> None:
    """Write the token shards of a corpus, unless they are there."""
    target = folder / f"data-{corpus}"
    try:
        read_summary(target)
        return
    except DataError:
        texts = documents()
    train_documents, _ = split_documents(texts, _VALIDATION_FRACTION)
    build_shards(texts, train_tokenizer(train_documents, VOCAB_SIZE), target, _VALIDATION_FRACTION, source=corpus)


def _report_hours(report: Report, results: Results) -> None:
    """Report what all runs took, as if two cores had been busy all the time; load from elsewhere lengthens it."""
    seconds = sum(float(result["train_s"]) for result in results.values())
    report.add("hours_on_two_cores", seconds / 2 / 3600, "h", detail={"runs": len(results)}, at_most=3.0)


def _report_sweeps(report: Report, results: Results, best: BestRate) -> None:
    """Report every rate that was tried with the first seed."""
    for cell in sorted((cell for cell in results if cell.seed == 0), key=_order):
        report.add(
            "sweep_ppl",
            float(results[cell]["validation_ppl"]),
            "PPL",
            detail={
                "corpus": cell.corpus,
                "size": cell.size,
                "precision": cell.precision,
                "peak_learning_rate": cell.peak_learning_rate,
                "is_best": cell.peak_learning_rate == best(cell.corpus, cell.size, cell.precision),
            },
        )


def _order(cell: Cell) -> tuple[int, str, float]:
    return TRAINED.index((cell.corpus, cell.size)), cell.precision, cell.peak_learning_rate


def _report(report: Report, entries: list[Entry], sizes: tuple[str, ...]) -> None:
    for entry in entries:
        _report_entry(report, entry)
    corpora: tuple[Corpus, ...] = ("code", "prose")
    for corpus in corpora:
        _report_twins(report, entries, corpus)
    _report_gap(report, entries, sizes)
    _report_equal_bytes(report, entries)


def _report_entry(report: Report, entry: Entry) -> None:
    where = {"corpus": entry.corpus, "size": entry.size, "precision": entry.precision}
    report.add(
        "validation_ppl",
        entry.perplexity,
        "PPL",
        detail={
            **where,
            "active_parameters": entry.num_active_parameters,
            "bytes": entry.stored_bytes,
            "peak_learning_rate": entry.peak_learning_rate,
            "losses_by_seed": [round(loss, 4) for loss in entry.losses],
        },
    )
    worst = {"worst_layer": round(entry.worst_load_cv, 3), "seeds": len(entry.load_cv)}
    report.add("load_cv", max(entry.load_cv), "ratio", detail={**where, **worst}, at_most=_goal(report, 0.3))
    report.add("dead_experts", entry.num_dead_experts, "count", detail=where, at_most=_goal(report, 0.0))


def _goal(report: Report, value: float) -> float | None:
    """Return a goal, unless the models were trained for some steps only."""
    return None if report.is_quick else value


def _report_twins(report: Report, entries: list[Entry], corpus: Corpus) -> None:
    twins = {entry.size: entry for entry in select(entries, "float", corpus)}
    others: tuple[Precision, ...] = ("ternary", "int4-experts", "binary")
    for entry in (entry for precision in others for entry in select(entries, precision, corpus)):
        if (twin := twins.get(entry.size)) is None:
            continue
        is_ternary = entry.precision == "ternary"
        report.add(
            _GAP_METRIC if is_ternary else "other_ppl_vs_twin",
            ratio_to_twin(entry, twin),
            "ratio",
            baseline="float twin, equal parameters",
            baseline_value=twin.perplexity,
            detail={
                "corpus": corpus,
                "size": entry.size,
                "precision": entry.precision,
                "by_seed": [round(ratio, 4) for ratio in seed_ratios(entry, twin)],
            },
            at_most=_goal(report, 1.05) if is_ternary else None,
        )
    for twin in twins.values():
        if twin.rounded_losses:
            rounded = Entry(**{**vars(twin), "losses": twin.rounded_losses})
            report.add(
                "rounded_after_training_vs_twin",
                ratio_to_twin(rounded, twin),
                "ratio",
                baseline="float twin",
                baseline_value=twin.perplexity,
                detail={"corpus": corpus, "size": twin.size, "ppl": round(rounded.perplexity, 1)},
            )


def _report_gap(report: Report, entries: list[Entry], sizes: tuple[str, ...]) -> None:
    """Compare what ternary loses to its twin at the largest size with the smallest; where it is ahead, that is 0."""
    twins = {entry.size: entry for entry in select(entries, "float")}
    ratios = {
        entry.size: ratio_to_twin(entry, twins[entry.size])
        for entry in select(entries, "ternary")
        if entry.size in twins
    }
    if sizes[0] in ratios and sizes[-1] in ratios:
        smallest, largest = (max(0.0, ratios[size] - 1) for size in (sizes[0], sizes[-1]))
        report.add(
            "gap_of_largest",
            largest,
            "ratio",
            baseline=f"gap at {sizes[0]}",
            baseline_value=smallest,
            detail={size: round(ratio, 4) for size, ratio in ratios.items()},
            at_most=_goal(report, smallest),
        )


def _report_equal_bytes(report: Report, entries: list[Entry]) -> None:
    for ternary in select(entries, "ternary"):
        for precision in competitors():
            rival = at_bytes(select(entries, precision), ternary.stored_bytes)
            if rival is None:
                continue
            report.add(
                "ppl_vs_equal_bytes",
                ternary.perplexity / rival.perplexity,
                "ratio",
                baseline=f"{precision}, {rival.how}",
                baseline_value=rival.perplexity,
                detail={"corpus": "code", "size": ternary.size, "bytes": ternary.stored_bytes},
                at_most=_goal(report, 1.0),
            )


if __name__ == "__main__":
    main()
