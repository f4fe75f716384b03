"""How far a training run is: lines of ``metrics.jsonl`` enter one by one, the numbers that a person watches leave."""

import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from cluster.training.attempts import num_restarts, read_attempts
from cluster.training.checkpoint_folder import checkpoint_folders, checkpoint_step

_WINDOW = 20
_LOOK_EVERY_S = 1.0


class RunProgress:
    """What is known of a run.

    Args:
        num_steps: of the whole run.
        out_folder: where it writes; looked at for workers and checkpoints.

    Attributes:
        step: the last one that was told; goes back when workers start again.
        line: the last training line, empty before the first.
        evaluation: the last evaluation line, empty before the first.
    """

    def __init__(self, num_steps: int, out_folder: Path) -> None:
        self.num_steps = num_steps
        self.step = 0
        self.line: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.files = RunFiles(out_folder)
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)

    def take(self, line: dict[str, Any]) -> None:
        """Take a line of metrics."""
        if "validation_loss" in line:
            self.evaluation = line
        if "loss" in line:
            if line["step"] <= self.step:  # workers started again: the steps before do not tell the speed of these
                self._recent.clear()
            self.step, self.line = line["step"], line
            self._recent.append(line)

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of the last 20 steps, nats a token."""
        return statistics.fmean(line["loss"] for line in self._recent) if self._recent else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median speed of the last 20 steps."""
        return statistics.median(line["tokens_per_s"] for line in self._recent) if self._recent else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the last step at the pace of the last 20, evaluations and checkpoints included."""
        if len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        seconds_per_step: float = (last["elapsed_s"] - first["elapsed_s"]) / (last["step"] - first["step"])
        return max(0.0, seconds_per_step * (self.num_steps - self.step))

    @property
    def expert_load(self) -> list[list[float]]:
        """``[num_layers][E]`` shares of the last evaluation; empty before the first."""
        load: list[list[float]] = self.evaluation.get("expert_load", [])
        return load

    @property
    def num_dead_experts(self) -> int | None:
        """Experts that no token of the last evaluation visited; ``None`` before the first."""
        return sum(share == 0 for layer in self.expert_load for share in layer) if self.expert_load else None


class RunFiles:
    """What the files of a run say beside its metrics; they are read once a second at most.

    Args:
        out_folder: of the run.
    """

    def __init__(self, out_folder: Path) -> None:
        self._out_folder = out_folder
        self._looked_at = -math.inf
        self._num_before = len(read_attempts(out_folder))
        self.num_workers: int | None = None
        self.num_restarts = 0
        self.checkpoint_step: int | None = None
        self.checkpoint_age_s = 0.0

    def look(self) -> None:
        """Read the files again, if a second passed."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        attempts = read_attempts(self._out_folder)[self._num_before :]
        if attempts:
            self.num_workers, self.num_restarts = attempts[-1].num_workers, num_restarts(attempts)
        if folders := checkpoint_folders(self._out_folder):
            self.checkpoint_step = checkpoint_step(folders[0])
            try:
                self.checkpoint_age_s = max(0.0, time.time() - folders[0].stat().st_mtime)
            except OSError:  # deleted in this moment
                self.checkpoint_step = None
