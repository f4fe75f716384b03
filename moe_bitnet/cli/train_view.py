"""What a person sees of a training run: a live panel on a terminal, a line a step elsewhere, or JSON lines."""

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.align import Align
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.training.config import TrainConfig
from moe_bitnet.cli.console import console, say
from moe_bitnet.cli.reporting.units import format_bytes, format_seconds
from moe_bitnet.cli.train_progress import RunProgress

ProgressMode = Literal["auto", "lines", "json", "off"]
OnLine = Callable[[dict[str, Any]], None]

_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_BAR_EXPERTS = 64
_MAX_LAYERS = 8


@contextmanager
def training_view(title: str, config: TrainConfig, mode: ProgressMode = "auto") -> Iterator[OnLine | None]:
    """Show a run while the block runs.

    Args:
        title: of the run.
        config: its settings.
        mode: ``"auto"`` is the live panel on a terminal and a line a step elsewhere; ``"json"`` writes each line of
            metrics to stderr as it is.
    Yields:
        what takes each line of metrics, or ``None`` where nothing is shown.
    """
    progress = RunProgress(config.num_steps, config.out_folder)
    if mode == "off":
        yield None
    elif mode == "json":
        yield _write_json
    elif mode == "auto" and console.is_terminal:
        view = LiveView(title, progress)
        with Live(get_renderable=view.render, console=console, refresh_per_second=4):
            yield view.take
    else:
        yield lambda line: _say_line(progress, line)


class LiveView:
    """The panel: one thread takes lines, another one draws.

    Args:
        title: of the run.
        progress: of the run.
    """

    def __init__(self, title: str, progress: RunProgress) -> None:
        self._title = title
        self._progress = progress
        self._lock = threading.Lock()

    def take(self, line: dict[str, Any]) -> None:
        """Take a line of metrics."""
        with self._lock:
            self._progress.take(line)

    def render(self) -> RenderableType:
        """Draw what is known now."""
        with self._lock:
            self._progress.files.look()
            return render_panel(self._title, self._progress)


def render_panel(title: str, progress: RunProgress) -> Panel:
    """Draw a run as a panel."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in panel_rows(progress):
        table.add_row(Text(name), Text(value))
    bar = ProgressBar(total=progress.num_steps, completed=progress.step, width=48)
    head = f"{title} · step {progress.step}/{progress.num_steps}"
    return Panel(Group(Align.left(bar), table), title=Text(head), title_align="left", expand=False, width=76)


def panel_rows(progress: RunProgress) -> list[tuple[str, str]]:
    """Return names and values of the panel; what is not known yet is left out."""
    if not progress.line:
        return [("waiting", "for Ray, the workers and the compiler"), *_worker_rows(progress)]
    line, evaluation = progress.line, progress.evaluation
    mean = f"   mean of the last steps {progress.mean_loss:.3f}" if progress.mean_loss is not None else ""
    rows = [("loss", f"{line['loss']:.3f}   PPL {_perplexity(line['loss'])}{mean}")]
    if evaluation:
        loss = evaluation["validation_loss"]
        rows.append(("validation", f"{loss:.3f}   PPL {_perplexity(loss)}   after step {evaluation['step']}"))
    rows.append(("speed", f"{_speed(progress.tokens_per_s)}{_remaining(progress)}"))
    norm = f"   gradient norm {line['gradient_norm']:.3g}" if "gradient_norm" in line else ""
    rows.append(("learning rate", f"{line['learning_rate']:.2e}{norm}"))
    rows += _load_rows(progress)
    if line.get("dispatch_bytes"):
        rows.append(("dispatch", f"{format_bytes(line['dispatch_bytes'])} a step"))
    return [*rows, *_worker_rows(progress)]


def describe_line(progress: RunProgress, line: dict[str, Any]) -> str:
    """Return one line of text for a line of metrics that ``progress`` took."""
    parts = [f"step {line['step']}/{progress.num_steps}"]
    if "validation_loss" in line:
        parts += [f"validation loss {line['validation_loss']:.3f}", f"PPL {_perplexity(line['validation_loss'])}"]
    else:
        parts += [f"loss {line['loss']:.3f}", f"PPL {_perplexity(line['loss'])}", _speed(line["tokens_per_s"])]
        if line.get("dispatch_bytes"):
            parts.append(f"dispatch {line['dispatch_bytes'] / 1e6:.1f} MB/step")
        parts.append(f"load CV {line['expert_load_cv']:.2f}")
        if progress.remaining_s is not None:
            parts.append(f"{format_seconds(progress.remaining_s)} left")
    return "  ".join(parts)


def _say_line(progress: RunProgress, line: dict[str, Any]) -> None:
    num_restarts = progress.files.num_restarts
    progress.take(line)
    progress.files.look()
    if progress.files.num_restarts > num_restarts:
        say(f"workers started again, from the last checkpoint: {progress.files.num_workers} of them")
    say(describe_line(progress, line))


def _write_json(line: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


def _load_rows(progress: RunProgress) -> list[tuple[str, str]]:
    """Return the expert load: a bar an expert after the first evaluation, the range of each layer before."""
    line = progress.line
    num_dead = progress.num_dead_experts
    if num_dead is None:
        note = f"   {line['num_idle_experts']} idle in this step" if "num_idle_experts" in line else ""
        layers = [f"{low:.2f} – {high:.2f}" for low, high in _ranges(line)]
    else:
        note = f"   {num_dead} dead"
        layers = [_bar(layer) for layer in progress.expert_load]
    rows = [("expert load", f"CV {line['expert_load_cv']:.2f}{note}   (1 is an even share)")]
    rows += [(f"  layer {index}", text) for index, text in enumerate(layers[:_MAX_LAYERS])]
    if len(layers) > _MAX_LAYERS:
        rows.append(("", f"and {len(layers) - _MAX_LAYERS} layers more"))
    return rows


def _ranges(line: dict[str, Any]) -> list[tuple[float, float]]:
    return list(zip(line.get("expert_load_min", []), line.get("expert_load_max", []), strict=False))


def _bar(shares: list[float]) -> str:
    """Draw one block an expert, half high at an even share, with the smallest and the largest multiple of it."""
    loads = [share * len(shares) for share in shares]
    text = f"{min(loads):.2f} – {max(loads):.2f}"
    if len(loads) > _MAX_BAR_EXPERTS:
        return text
    blocks = ["·" if load == 0 else _BLOCKS[min(len(_BLOCKS) - 1, int(load * len(_BLOCKS) / 2))] for load in loads]
    return f"{''.join(blocks)}   {text}"


def _worker_rows(progress: RunProgress) -> list[tuple[str, str]]:
    files = progress.files
    if files.num_workers is None:
        return []
    restarts = f"   {files.num_restarts} restarts" if files.num_restarts else ""
    rows = [("workers", f"{files.num_workers}{restarts}")]
    if files.checkpoint_step is not None:
        age = format_seconds(files.checkpoint_age_s)
        rows.append(("checkpoint", f"after step {files.checkpoint_step}, {age} ago"))
    return rows


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 20 else f"e^{loss:.0f}"


def _speed(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f"{tokens_per_s / 1000:.1f}k tok/s"


def _remaining(progress: RunProgress) -> str:
    return "" if progress.remaining_s is None else f"   {format_seconds(progress.remaining_s)} left"
