"""A measured number with everything that is needed to read it later: one JSON line each.

Tables, plots and reports are made from these lines only, so a line carries its goal
(``at_least`` or ``at_most`` in ``detail``), its baseline, the machine and the versions.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_bitnet.errors import DataError

AT_LEAST, AT_MOST = "at_least", "at_most"
"""Keys of ``detail`` that hold a metric's goal."""


@dataclass(frozen=True)
class Metric:
    """One number of one benchmark.

    Attributes:
        metric: ``<benchmark>.<name>``, such as ``decode.overhead_share``.
        value: the number; ``None`` where it could not be measured (``detail`` says why).
        unit: ``ratio``, ``bytes``, ``s``, ``1/s``, ``GB/s``, ...
        baseline: what it is compared with, in words; ``None`` without a comparison.
        baseline_value: the baseline's own measurement.
        detail: shapes, threads, format, spread and the goal; JSON-ready.
        machine: see :func:`benchmarks.machine.describe_machine`.
        versions: package name to version.
        commit: of this checkout.

    Raises:
        DataError: a number is infinite or NaN, which JSON cannot hold.
    """

    metric: str
    value: float | None
    unit: str
    baseline: str | None = None
    baseline_value: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = "unknown"

    def __post_init__(self) -> None:
        for name in ("value", "baseline_value"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise DataError(f"{self.metric}: {name} is {number}; give a finite number, or None and a reason.")

    @property
    def goal(self) -> float | None:
        """The number to reach, if the line carries one."""
        goal = self.detail.get(AT_LEAST, self.detail.get(AT_MOST))
        return None if goal is None else float(goal)

    @property
    def reaches_goal(self) -> bool | None:
        """Whether the value is on the right side of its goal; ``None`` without value or goal."""
        if self.value is None or self.goal is None:
            return None
        return self.value >= self.goal if AT_LEAST in self.detail else self.value <= self.goal

    def to_json_line(self) -> str:
        """Return the metric as one line of strict JSON, without the newline."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json_line(cls, line: str, source: str = "metric") -> "Metric":
        """Read what :meth:`to_json_line` wrote; unknown keys are ignored.

        Args:
            line: one JSON object.
            source: what to call the line in an error, such as ``file:3``.
        Raises:
            DataError: the line is no JSON object, or has no metric, value or unit.
        """
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}: not JSON ({error}). Run the benchmark again with --json.") from error
        if not isinstance(values, dict) or not {"metric", "value", "unit"} <= values.keys():
            raise DataError(f"{source}: expected a JSON object with metric, value and unit.")
        known = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def write_metrics(metrics: Iterable[Metric], path: Path) -> None:
    """Write JSON lines, in place of what the file held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(metric.to_json_line() + "\n" for metric in metrics), encoding="utf-8")


def read_metrics(path: Path) -> list[Metric]:
    """Read JSON lines; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, or a line is no metric; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a file that a benchmark wrote.") from error
    return [
        Metric.from_json_line(line, source=f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
