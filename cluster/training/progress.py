"""Follow a run's ``metrics.jsonl`` from another process, to draw its progress."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

OnProgress = Callable[[dict[str, Any]], None]
_POLL_S = 0.25


class MetricsFollower:
    """Calls back with each new line of a metrics file while the ``with`` block runs, from a thread.

    Lines that are there when it starts are not new. When a resumed worker replaces the file, the lines
    that it kept are not told again.

    Args:
        path: the file; it may appear later.
        on_line: takes a parsed line. If it raises, that is logged and following ends.
    """

    def __init__(self, path: Path, on_line: OnProgress) -> None:
        self._path = path
        self._on_line = on_line
        self._inode, self._offset = -1, 0
        self._seen = {hash(line) for line in self._read_lines()}  # hashes: a long run has many lines
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-follower", daemon=True)

    def __enter__(self) -> "MetricsFollower":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_done.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._is_done.wait(_POLL_S):
                self._tell_new()
            self._tell_new()
        except Exception:
            logger.exception("on_progress failed; training goes on without it")

    def _tell_new(self) -> None:
        for line in self._read_lines():
            if hash(line) not in self._seen:
                self._seen.add(hash(line))
                self._on_line(json.loads(line))

    def _read_lines(self) -> list[str]:
        """Return the whole lines since the last call; all of them if the file was replaced."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(newline)
        lines = whole.decode("utf-8", errors="replace").split("\n")
        return [line for line in lines if line.startswith("{") and line.endswith("}")]
