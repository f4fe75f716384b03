"""A run folder enters, :class:`Results` leave; results enter, the content of ``report.json`` leaves."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from cluster.training.shards import ShardSummary
from cluster.training.summary import TrainingSummary
from moe_bitnet.cli.reporting.comparison import comparison_rows
from moe_bitnet.cli.reporting.metrics import headline_metrics
from moe_bitnet.cli.reporting.record import parse_record, read_lines, read_record, to_strict_json
from moe_bitnet.cli.reporting.sections import (
    ContextSection,
    EvaluationPoint,
    GenerateSection,
    MachineSection,
    PackSection,
    PlaceSection,
    Results,
    TrainingPoint,
    TrainingSection,
)
from moe_bitnet.errors import DataError

# What writes each section: (section of Results, name for people, subcommand).
STEPS = (
    ("data", "Text", "data"),
    ("ternary", "Training, ternary", "train --precision ternary"),
    ("twin", "Training, float twin", "train --precision float"),
    ("pack", "Size on disk", "pack"),
    ("place", "Placement", "place"),
    ("generate", "Generation", "generate"),
    ("context", "Long context", "context"),
    ("machine", "Machine", "demo"),
)

_Point = TypeVar("_Point", TrainingPoint, EvaluationPoint)


def load_results(run_folder: Path) -> Results:
    """Read what the steps of a demo left in ``run_folder``; a step that was not run gives ``None``.

    Raises:
        DataError: the folder is missing, or a file in it is malformed; the message names file and field.
    """
    if not run_folder.is_dir():
        raise DataError(f"{run_folder} is not a folder. Pass the run folder that `moe-bitnet demo` has written.")
    return Results(
        name=run_folder.resolve().name,
        data=read_record(ShardSummary, run_folder / "data" / "summary.json"),
        ternary=load_training(run_folder / "ternary"),
        twin=load_training(run_folder / "float"),
        pack=read_record(PackSection, run_folder / "pack.json"),
        place=read_record(PlaceSection, run_folder / "place.json"),
        generate=read_record(GenerateSection, run_folder / "generate.json"),
        context=read_record(ContextSection, run_folder / "context.json"),
        machine=read_record(MachineSection, run_folder / "machine.json"),
    )


def step_command(section: str) -> str:
    """Return the command that produces ``section`` (a field of :class:`Results`)."""
    step = next(step for name, _, step in STEPS if name == section)
    return f"moe-bitnet {step}"


def is_complete(section: object) -> bool:
    """Tell whether the step of a section (a value of a field of :class:`Results`) was run to its end."""
    return section is not None and not (isinstance(section, TrainingSection) and section.summary is None)


def to_report(results: Results) -> dict[str, Any]:
    """Summarise results as strict JSON values.

    Returns:
        ``metrics`` (the headline numbers, one flat object each), ``comparison`` (the rows of the table, as
        text), ``missing`` (sections not run or not finished and the command for each) and ``sections`` (the
        inputs; of the training history the evaluations only, the rest stays in ``metrics.jsonl``).
    """
    sections = {name: getattr(results, name) for name, _, _ in STEPS}
    report = {
        "run": results.name,
        "metrics": headline_metrics(results),
        "comparison": [dataclasses.asdict(row) for row in comparison_rows(results)],
        "missing": [
            {"section": name, "title": title, "command": step_command(name)}
            for name, title, _ in STEPS
            if not is_complete(sections[name])
        ],
        "sections": {name: _to_dict(section) for name, section in sections.items() if section is not None},
    }
    strict: dict[str, Any] = to_strict_json(report)
    return strict


def _to_dict(section: Any) -> dict[str, Any]:
    values = dataclasses.asdict(section)
    values.pop("points", None)
    for evaluation in values.get("evaluations", ()):
        del evaluation["expert_load"]  # the summary has that of the last one
    return values


def load_training(folder: Path) -> TrainingSection | None:
    """Read what a training run left, finished or not; ``None`` if it left nothing.

    Raises:
        DataError: a file is malformed; the message names file and field.
    """
    summary_path, history_path = folder / "summary.json", folder / "metrics.jsonl"
    summary = read_record(TrainingSummary, summary_path)
    if summary is not None and len({len(row) for row in summary.expert_load}) > 1:
        raise DataError(f"{summary_path}: the rows of field 'expert_load' differ in length; each layer has E experts.")
    if summary is None and not history_path.exists():
        return None
    points: list[TrainingPoint] = []
    evaluations: list[EvaluationPoint] = []
    for number, line in read_lines(history_path) if history_path.exists() else []:
        place = f"line {number}"
        if "validation_loss" in line:
            _append_from_step(evaluations, parse_record(EvaluationPoint, line, history_path, place))
        if "loss" in line or "validation_loss" not in line:
            _append_from_step(points, parse_record(TrainingPoint, line, history_path, place))
    return TrainingSection(summary, tuple(points), tuple(evaluations))


def _append_from_step(points: list[_Point], point: _Point) -> None:
    """Append ``point``; a step that goes back resumes from a checkpoint and replaces what came after it."""
    while points and points[-1].step >= point.step:
        points.pop()
    points.append(point)
