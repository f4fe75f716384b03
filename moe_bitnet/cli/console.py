"""What a person sees: progress and remarks on stderr, results on stdout."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
"""For progress and remarks; it draws bars on a terminal and plain lines elsewhere."""


def print_json(value: Any) -> None:
    """Write a result to stdout as one JSON object."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def say(text: str) -> None:
    """Write one line to stderr; square brackets are taken literally."""
    console.print(text, markup=False, emoji=False, soft_wrap=True)


class ProgressBar:
    """One bar with a remark beside it; without a terminal, a line every tenth of the way."""

    def __init__(self, progress: Progress, title: str, total: float) -> None:
        self._progress = progress
        self._title = title
        self._total = total
        self._task = progress.add_task(title, total=total, remark="")
        self._printed_tenth = 0

    def update(self, done: float, remark: str = "") -> None:
        """Show that ``done`` of the total is done."""
        self._progress.update(self._task, completed=done, remark=remark)
        tenth = int(10 * done / self._total) if self._total else 10
        if not console.is_terminal and tenth > self._printed_tenth:
            self._printed_tenth = tenth
            say(f"{self._title} {100 * done / self._total:.0f} %  {remark}")


@contextmanager
def progress_bar(title: str, total: float) -> Iterator[ProgressBar]:
    """Show a progress bar while the block runs."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[remark]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as progress:
        yield ProgressBar(progress, title, total)
