"""Six drawings of a run, each on axes that the caller made: losses, sizes, devices, traffic, context, expert load.

Colours come from a :class:`Palette`, so that the same drawing serves a light PNG and a
page with two themes. Blue (twin) and vermilion (ternary) stay apart under the common
forms of colour blindness; every bar also carries its name and its number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_bitnet.cli.reporting.metrics import TWIN_RUN, load_cv
from moe_bitnet.cli.reporting.sections import Results, TrainingSection
from moe_bitnet.cli.reporting.units import format_bytes, format_count, format_number

_MAX_LABEL = 44
_MAX_ANNOTATED_CELLS = 96
_MAX_VECTOR_CELLS = 2048
# From this ratio of the largest to the smallest bar on, the small one would vanish on a linear axis.
_LOG_FROM = 100.0
_BAR_HEIGHT = 0.44
_ROOM_FOR_TEXT = 1.42
# Loads within 1 ± 0.5 use part of the colour range only, so that an even model does not look uneven.
_MIN_LOAD_REACH = 0.5
LOAD_COLORS = LinearSegmentedColormap.from_list("load", ["#2b6ca8", "#f0eee8", "#d0561a"])


@dataclass(frozen=True)
class Palette:
    """Colours of a drawing: text and axes, and one for each model."""

    ink: str
    muted: str
    grid: str
    surface: str
    twin: str
    ternary: str
    ternary_light: str


@dataclass(frozen=True)
class Panel:
    """One drawing: ``draw`` may be called where ``is_available`` says so."""

    name: str
    title: str
    is_available: Callable[[Results], bool]
    draw: Callable[[Axes, Results, Palette], None]


@dataclass(frozen=True)
class _Bar:
    name: str
    value: float
    text: str
    color: str
    note: str = ""
    mark: float | None = None


def draw_loss(axes: Axes, results: Results, palette: Palette) -> None:
    """Draw the validation loss of both models against steps; the training loss lies faintly behind."""
    highest: list[float] = []
    lowest: list[float] = []
    models = ((results.twin, "float twin", palette.twin, "-"), (results.ternary, "ternary", palette.ternary, "-"))
    for section, name, color, style in models:
        if section is None:
            continue
        losses = mean_over_neighbours([(point.step, point.loss) for point in section.points])
        validation = [(point.step, point.validation_loss) for point in section.evaluations]
        axes.plot(*columns(losses), color=color, linewidth=1.1, alpha=0.45)
        axes.plot(
            *columns(validation), color=color, linewidth=2.0, linestyle=style, marker="o", markersize=3.6, label=name
        )
        finite = [loss for _, loss in validation or losses if math.isfinite(loss)]
        highest += [max(finite)] if finite else []
        lowest += [min(loss for _, loss in losses + validation if math.isfinite(loss))] if finite else []
    if highest:
        room = max(max(highest) - min(lowest), 1e-3)
        axes.set_ylim(min(lowest) - 0.05 * room, max(highest) + 0.08 * room)
    style_axes(axes, palette)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("training step", color=palette.muted, fontsize="small")
    note_above(axes, "loss (nats/token): line with dots validation, faint line training, smoothed", palette)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=palette.ink, loc="upper right")


def draw_sizes(axes: Axes, results: Results, palette: Palette) -> None:
    """Draw the bytes on disk: the whole file and the experts alone, FP16 and packed."""
    assert results.pack is not None
    pack, bars = results.pack, []
    for name, fp16, packed in (
        ("model file", pack.fp16_file_bytes, [entry.file_bytes for entry in pack.layouts]),
        ("expert weights", pack.fp16_expert_bytes, [entry.expert_bytes for entry in pack.layouts]),
    ):
        bars.append(_Bar(f"{name}, FP16", fp16, format_bytes(fp16), palette.twin))
        for index, (entry, num_bytes) in enumerate(zip(pack.layouts, packed, strict=True)):
            color = palette.ternary if index == 0 else palette.ternary_light
            bars.append(_Bar(f"{name}, ternary {entry.layout}", num_bytes, format_bytes(num_bytes), color))
    _draw_bars(axes, bars, palette)


def draw_devices(axes: Axes, results: Results, palette: Palette) -> None:
    """Draw the devices that each format needs; a line marks the lower bound."""
    assert results.place is not None
    bars = []
    for name, fit, color in (
        ("FP16 experts", results.place.float16, palette.twin),
        (f"ternary experts, {results.place.layout}", results.place.ternary, palette.ternary),
    ):
        bars.append(_Bar(name, fit.num_devices, str(fit.num_devices), color, f"lower bound {fit.lower_bound}"))
    _draw_bars(axes, bars, palette)
    for row, bar in enumerate(bars):  # one block a device
        for edge in range(1, int(bar.value) if bar.value <= 64 else 0):
            axes.plot([edge, edge], _bar_edges(row), color=palette.surface, linewidth=1.6)


def draw_traffic(axes: Axes, results: Results, palette: Palette) -> None:
    """Draw the bytes between devices for each token of each run; a diamond marks the formula."""
    assert results.generate is not None
    bars, num_ternary = [], 0
    for run in results.generate.runs:
        color = palette.twin if run.name == TWIN_RUN else (palette.ternary, palette.ternary_light)[num_ternary % 2]
        num_ternary += run.name != TWIN_RUN
        devices = f"{run.num_devices} device" + ("" if run.num_devices == 1 else "s")
        name = f"{run.name} · {devices} · {run.dispatch} → {run.combine}"
        mark = run.formula_bytes_per_token
        text = "0" if run.bytes_per_token == 0 else format_bytes(run.bytes_per_token)
        bars.append(_Bar(name, run.bytes_per_token, text, color, mark=mark if mark > 0 else None))
    _draw_bars(axes, bars, palette)


def draw_context(axes: Axes, results: Results, palette: Palette) -> None:
    """Draw the tokens that fit into the budget; a notch marks the length seen in training."""
    assert results.context is not None
    context, bars = results.context, []
    for entry in context.formats:
        name = f"{entry.format} cache, {format_number(entry.effective_bits, 2)} bits a value"
        color = palette.twin if entry.format == "fp16" else palette.ternary
        note = f"PPL {format_number(entry.ppl_common, 2)}"
        bars.append(_Bar(name, entry.num_tokens, format_count(entry.num_tokens), color, note))
    _draw_bars(axes, bars, palette)
    for row, entry in enumerate(context.formats):
        if 0 < context.trained_seq_len < entry.num_tokens:
            notch = [context.trained_seq_len] * 2
            axes.plot(notch, _bar_edges(row), color=palette.surface, linewidth=2.0)


def draw_expert_load(axes: Axes, results: Results, palette: Palette) -> None:
    """Draw the load of every expert as a multiple of the even share, one row a layer."""
    section = load_section(results)
    assert section is not None
    assert section.summary is not None
    shares = np.array(section.summary.expert_load, dtype=float)
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12) * shares.shape[1]  # 1 = even share
    num_layers, num_experts = shares.shape
    distance = np.abs(shares - 1.0)
    reach = max(_MIN_LOAD_REACH, float(np.nanmax(distance, initial=0.0, where=np.isfinite(distance))))
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(shares), cmap=LOAD_COLORS, vmin=1.0 - reach, vmax=1.0 + reach,
        edgecolors=palette.surface, linewidth=1.5,
    )  # fmt: skip
    mesh.set_rasterized(shares.size > _MAX_VECTOR_CELLS)
    if shares.size <= _MAX_ANNOTATED_CELLS:
        for layer, expert in np.ndindex(shares.shape):
            share = float(shares[layer, expert])
            color = "#ffffff" if abs(share - 1.0) > 0.62 * reach else "#1d2430"
            place = (expert + 0.5, layer + 0.5)
            axes.text(*place, format_number(share, 2), color=color, ha="center", va="center", fontsize="small")
    axes.invert_yaxis()
    style_axes(axes, palette)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    label_cells(axes.xaxis, num_experts)
    label_cells(axes.yaxis, num_layers)
    axes.set_xlabel("expert", color=palette.muted, fontsize="small")
    axes.set_ylabel("layer", color=palette.muted, fontsize="small")
    note_above(axes, f"load as a multiple of the even share 1/{num_experts}; blue below, orange above", palette)


def load_section(results: Results) -> TrainingSection | None:
    """Return the model whose expert load is drawn: the ternary one, else the twin; ``None`` without loads."""
    for section in (results.ternary, results.twin):
        if section is not None and section.summary is not None and load_cv(section.summary.expert_load) is not None:
            return section
    return None


def _has_history(results: Results) -> bool:
    sections = (results.ternary, results.twin)
    return any(section is not None and (section.points or section.evaluations) for section in sections)


PANELS = (
    Panel("loss", "Loss", _has_history, draw_loss),
    Panel("sizes", "Bytes on disk", lambda results: results.pack is not None, draw_sizes),
    Panel("devices", "Devices needed", lambda results: results.place is not None, draw_devices),
    Panel(
        "traffic",
        "Bytes between devices, per token",
        lambda results: results.generate is not None and len(results.generate.runs) > 0,
        draw_traffic,
    ),
    Panel(
        "context",
        "Longest context in the budget",
        lambda results: results.context is not None and len(results.context.formats) > 0,
        draw_context,
    ),
    Panel("load", "Expert load", lambda results: load_section(results) is not None, draw_expert_load),
)


def _draw_bars(axes: Axes, bars: Sequence[_Bar], palette: Palette, min_rows: int = 2) -> None:
    """Draw horizontal bars, each with its name above and its number and note at its end."""
    finite = [bar.value for bar in bars if math.isfinite(bar.value)]
    positive = [value for value in finite if value > 0]
    longest = max(finite, default=0.0) or 1.0
    is_log = bool(positive) and longest / min(positive) > _LOG_FROM
    start = min(positive) / 4 if is_log else 0.0
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(start, start * (longest / start) ** _ROOM_FOR_TEXT)
    else:
        axes.set_xlim(0.0, longest * _ROOM_FOR_TEXT)
    for row, bar in enumerate(bars):
        end = max(bar.value, start) if math.isfinite(bar.value) else start
        axes.barh(row, end - start, left=start, height=_BAR_HEIGHT, color=bar.color)
        axes.plot([start, start], _bar_edges(row), color=palette.muted, linewidth=1.5)  # where zero is, seen at 0
        number = axes.annotate(
            bar.text, (end, row), xytext=(7, 0), textcoords="offset points", va="center", color=palette.ink,
            fontweight="bold", parse_math=False,
        )  # fmt: skip
        axes.annotate(
            bar.note, (1, 0.5), xycoords=number, xytext=(8, 0), textcoords="offset points", va="center",
            color=palette.muted, fontsize="small", parse_math=False,
        )  # fmt: skip
        axes.annotate(
            _shorten(bar.name), (0, row - _BAR_HEIGHT / 2), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", va="bottom", color=palette.muted, fontsize="small", parse_math=False,
        )  # fmt: skip
        if bar.mark is not None and math.isfinite(bar.mark) and bar.mark > start:
            axes.plot([bar.mark], [row], marker="D", markersize=5, color=palette.surface, markeredgecolor=palette.ink)
    axes.set_ylim(max(len(bars), min_rows) - 0.6, -0.8)
    axes.set_axis_off()
    if is_log:
        note_above(axes, "logarithmic axis", palette)


def _bar_edges(row: int) -> list[float]:
    return [row - _BAR_HEIGHT / 2, row + _BAR_HEIGHT / 2]


def style_axes(axes: Axes, palette: Palette) -> None:
    """Give axes the look of all drawings: a thin base line, faint horizontal lines."""
    axes.patch.set_alpha(0.0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.muted)
    axes.tick_params(colors=palette.muted, labelsize="small", length=3)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def note_above(axes: Axes, text: str, palette: Palette) -> None:
    """Write a small note above axes."""
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", va="bottom",
        color=palette.muted, fontsize="small", parse_math=False,
    )  # fmt: skip


def label_cells(axis: object, num_cells: int) -> None:
    """Number the cells of a grid along one axis, at most 16 of them."""
    step = max(1, math.ceil(num_cells / 16))
    cells = range(0, num_cells, step)
    axis.set_ticks([cell + 0.5 for cell in cells], labels=[str(cell) for cell in cells])  # type: ignore[attr-defined]


def mean_over_neighbours(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average each value with those before it, over a fiftieth of the run, so that batches' noise hides no trend."""
    width = max(1, len(pairs) // 50)
    values = [value for _, value in pairs]
    smooth = []
    for index, (step, _) in enumerate(pairs):
        window = values[max(0, index - width + 1) : index + 1]
        smooth.append((step, sum(window) / len(window)))
    return smooth


def columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Split pairs into two lists; what is not finite leaves a gap in a line."""
    return [step for step, _ in pairs], [value if math.isfinite(value) else math.nan for _, value in pairs]


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"
