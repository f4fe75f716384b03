"""The report of one training run, finished or not: ``<out>/report.html``, self-contained, and ``curves.png``."""

from pathlib import Path
from typing import Any

from cluster.training.attempts import Attempt, read_attempts
from cluster.training.summary import SETTINGS_NAME
from moe_bitnet.cli.reporting.figures import Drawing, drawing_svg, drawings_png, save_png
from moe_bitnet.cli.reporting.html import page
from moe_bitnet.cli.reporting.markup import Markup, element, table
from moe_bitnet.cli.reporting.metrics import load_cv
from moe_bitnet.cli.reporting.record import to_strict_json
from moe_bitnet.cli.reporting.sections import EvaluationPoint, TrainingSection
from moe_bitnet.cli.reporting.summary import load_training
from moe_bitnet.cli.reporting.training_curves import training_drawings
from moe_bitnet.cli.reporting.units import DASH, format_bytes, format_count, format_number, format_seconds
from moe_bitnet.errors import DataError
from moe_bitnet.files import read_json, write_text_atomically

REPORT_NAME = "report.html"
CURVES_NAME = "curves.png"
_SVG_HEIGHT = 280


def write_training_report(out_folder: Path) -> dict[str, Any]:
    """Write the report of a run from its metrics, and from its summary if it is finished.

    Returns:
        the headline numbers by name, those of the page.
    Raises:
        DataError: the folder holds no training run, or a file in it is malformed.
    """
    section = load_training(out_folder)
    if section is None or not (section.points or section.evaluations):
        raise DataError(f"{out_folder}: holds no metrics of a training run. Give the out_folder of one.")
    attempts, settings = read_attempts(out_folder), _read_settings(out_folder)
    text = render_training_report(out_folder.resolve().name, section, attempts, settings)
    png = drawings_png(f"Training · {out_folder.resolve().name}", training_drawings(section))
    save_png(png, out_folder / CURVES_NAME)
    write_text_atomically(out_folder / REPORT_NAME, text)
    strict: dict[str, Any] = to_strict_json(_numbers(section, attempts))
    return {"report": str(out_folder / REPORT_NAME), "curves": str(out_folder / CURVES_NAME), **strict}


def render_training_report(
    name: str, section: TrainingSection, attempts: list[Attempt], settings: dict[str, dict[str, Any]]
) -> str:
    """Return the page.

    Args:
        name: of the run.
        section: its history and summary.
        attempts: the starts of its workers.
        settings: names and values by heading, such as ``"model"``; they are shown as they are.
    """
    title = f"Training · {name}"
    header = element(
        "header",
        element("p", "moe-bitnet · training report", class_="kicker"),
        element("h1", title),
        element("p", _lede(section), class_="lede"),
        element("ul", *(element("li", fact) for fact in _facts(section, attempts)), class_="facts"),
    )
    headline = element("dl", *(_figure(*each) for each in _headline(section)), class_="headline")
    drawings = training_drawings(section)
    curves = [_curves(*drawings[index : index + 2]) for index in range(0, len(drawings), 2)]
    tables = [
        element(
            "section",
            element("h2", heading),
            table(["", "value"], [[key, _show(value)] for key, value in rows.items()]),
        )
        for heading, rows in (("Last expert load", _load_rows(section)), *settings.items())
        if rows
    ]
    return page(title, element("body", header, element("main", headline, *curves, *tables)))


def _curves(*drawings: Drawing) -> Markup:
    """Put up to two drawings side by side."""
    figures = [
        element(
            "div",
            element("h2", drawing.title),
            element("figure", Markup(drawing_svg(drawing, _SVG_HEIGHT, drawing.title))),
        )
        for drawing in drawings
    ]
    return element("section", element("div", *figures, class_="pair even"))


def _numbers(section: TrainingSection, attempts: list[Attempt]) -> dict[str, Any]:
    last, evaluation = section.points[-1] if section.points else None, _last_evaluation(section)
    return {
        "is_finished": section.summary is not None,
        "step": last.step if last else None,
        "loss": last.loss if last else None,
        "validation_loss": evaluation.validation_loss if evaluation else None,
        "validation_ppl": evaluation.validation_ppl if evaluation else None,
        "num_starts": len(attempts),
        "num_dead_experts": _num_dead(evaluation),
    }


def _lede(section: TrainingSection) -> str:
    summary = section.summary
    if summary is None:
        step = section.points[-1].step if section.points else section.evaluations[-1].step
        return f"A run that has not come to its end: what there is after step {step:,}."
    return (
        f"A {summary.precision} model of {format_count(summary.num_parameters)} parameters, "
        f"{format_count(summary.num_active_parameters)} of them active for a token, trained on "
        f"{format_count(summary.num_tokens)} tokens in {summary.num_steps:,} steps."
    )


def _facts(section: TrainingSection, attempts: list[Attempt]) -> list[str]:
    facts = [f"{format_seconds(section.points[-1].elapsed_s)} of training"] if section.points else []
    if attempts:
        last = attempts[-1]
        workers = f"{last.num_workers} worker" + ("" if last.num_workers == 1 else "s")
        facts += [f"{workers} on {last.device}", f"workers started {len(attempts)} times, last {last.started_at}"]
    return facts


def _headline(section: TrainingSection) -> list[tuple[str, str, str]]:
    """Return label, value and note of each headline number."""
    evaluation, points = _last_evaluation(section), section.points
    cells = []
    if evaluation is not None:
        loss = format_number(evaluation.validation_loss)
        cells.append(("Validation loss", loss, f"nats a token, after step {evaluation.step:,}"))
        cells.append(("Validation PPL", format_number(evaluation.validation_ppl, 2), "its exponential"))
    if points:
        speeds = sorted(point.tokens_per_s for point in points)
        cells.append(("Tokens a second", format_number(speeds[len(speeds) // 2], 0), "median over steps, all workers"))
    load = evaluation.expert_load if evaluation is not None else ()
    dead = _num_dead(evaluation)
    if dead is not None:
        cells.append(("Expert load CV", format_number(load_cv(load), 2), f"dead experts: {dead}"))
    traffic = [point.dispatch_bytes for point in points]
    if any(traffic):
        cells.append(("Dispatch", format_bytes(sum(traffic) / len(traffic)), "between workers, mean a step"))
    return cells


def _figure(label: str, value: str, note: str) -> Markup:
    return element(
        "div", element("dt", label), element("dd", value, class_="value"), element("dd", note, class_="note")
    )


def _last_evaluation(section: TrainingSection) -> EvaluationPoint | None:
    return section.evaluations[-1] if section.evaluations else None


def _num_dead(evaluation: EvaluationPoint | None) -> int | None:
    """Count the experts that no token of an evaluation visited."""
    if evaluation is None or not evaluation.expert_load:
        return None
    return sum(share == 0 for layer in evaluation.expert_load for share in layer)


def _load_rows(section: TrainingSection) -> dict[str, Any]:
    evaluation = _last_evaluation(section)
    load = evaluation.expert_load if evaluation is not None else ()
    return {
        f"layer {index}": " ".join(format_number(share * len(layer), 2) for share in layer)
        for index, layer in enumerate(load)
    }


def _read_settings(out_folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings that the run was started with, where they were written."""
    try:
        values = read_json(out_folder / SETTINGS_NAME)
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: each for name, each in values.items() if isinstance(each, dict)}


def _show(value: object) -> str:
    return DASH if value is None else str(value)
