"""Two ways to ask a run to stop after the step it is in: a signal, and a file.

Both leave a checkpoint behind. A signal reaches the process it is sent to; the
file reaches workers on other hosts, and workers that run in a thread, where Python
takes no signals.
"""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP_NAME = "stop-requested"


class StopSignals:
    """Catch SIGINT and SIGTERM while the ``with`` block runs; a second one acts as usual.

    Outside of the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)


def request_stop(out_folder: Path) -> None:
    """Ask the workers of a run to stop; the request stands until it is withdrawn."""
    out_folder.mkdir(parents=True, exist_ok=True)
    (out_folder / STOP_NAME).touch()


def withdraw_stop(out_folder: Path) -> None:
    """Forget an earlier request, before the run goes on."""
    (out_folder / STOP_NAME).unlink(missing_ok=True)


def is_stop_requested(out_folder: Path) -> bool:
    """Return whether :func:`request_stop` was called for this run."""
    return (out_folder / STOP_NAME).exists()
