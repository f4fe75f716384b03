"""What every benchmark shares: its options, and a report that collects its metrics.

    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    with Report("ternary_linear", arguments) as report:
        timing = median_time(lambda: ternary_linear(x, next(weights)))
        report.add("decode_share_of_bandwidth", share, "ratio", detail=timing.to_detail(), at_least=0.85)

JSON lines go to stdout as they are measured, so an interrupted run keeps what it has;
without ``--json`` a table follows at the end. Progress belongs on stderr.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from benchmarks.machine import describe_machine
from benchmarks.metrics import AT_LEAST, AT_MOST, Metric, write_metrics
from benchmarks.provenance import current_commit, installed_versions
from benchmarks.table import metrics_table
from moe_bitnet.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
_COMMITTED = "results"
_PLAIN_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--quick``, ``--json`` and ``--output`` to a benchmark's options."""
    parser.add_argument("--quick", action="store_true", help="at most a minute on 2 cores; fewer and smaller figures")
    parser.add_argument("--json", action="store_true", help="print one JSON line a metric instead of the table")
    parser.add_argument(
        "--output",
        metavar="FILE.jsonl",
        nargs="?",
        const=_COMMITTED,
        help="write the JSON lines to this file, too; without a name, to benchmarks/results/<machine>/<name>.jsonl",
    )


class Report:
    """Collects the metrics of one run; leaving the ``with`` block prints the table and writes the file.

    The file is written only if the block ends without an exception, so that a broken run replaces nothing.

    Args:
        benchmark: the benchmark's name, the first part of its metrics' names.
        arguments: parsed options of :func:`add_arguments`.
        extra_packages: packages whose versions matter, beside torch and numpy.
    Raises:
        ConfigError: a quick run was told to replace the committed results.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace, extra_packages: tuple[str, ...] = ()) -> None:
        if arguments.quick and arguments.output == _COMMITTED:
            raise ConfigError("--output without a name replaces the committed full run; name a file, or drop --quick.")
        self.benchmark = benchmark
        self.is_quick: bool = arguments.quick
        self.prints_json: bool = arguments.json
        self.machine = describe_machine()
        self.metrics: list[Metric] = []
        self._output: str | None = arguments.output
        self._versions = installed_versions(extra_packages)
        self._commit = current_commit()

    def add(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        baseline: str | None = None,
        baseline_value: float | None = None,
        detail: Mapping[str, Any] | None = None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> Metric:
        """Record one number, and print it at once with ``--json``.

        Args:
            name: the metric's name without the benchmark.
            value: ``None`` if it could not be measured; then ``detail`` says why.
            unit: ``ratio``, ``bytes``, ``s``, ``1/s``, ``GB/s``, ...
            baseline: what it is compared with.
            baseline_value: the baseline's own measurement.
            detail: shapes, threads, format, spreads.
            at_least: the goal, if more is better.
            at_most: the goal, if less is better.
        """
        goal = {AT_LEAST: at_least, AT_MOST: at_most}
        metric = Metric(
            metric=f"{self.benchmark}.{name}",
            value=value,
            unit=unit,
            baseline=baseline,
            baseline_value=baseline_value,
            detail={
                **(detail or {}),
                **{key: number for key, number in goal.items() if number is not None},
                **({"is_quick": True} if self.is_quick else {}),
            },
            machine=self.machine.to_dict(),
            versions=self._versions,
            commit=self._commit,
        )
        self.metrics.append(metric)
        if self.prints_json:
            print(metric.to_json_line(), flush=True)
        return metric

    def progress(self, text: str) -> None:
        """Tell the terminal what is being measured, on stderr."""
        print(f"{self.benchmark}: {text}", file=sys.stderr, flush=True)

    @property
    def output_path(self) -> Path | None:
        """Where the lines go beside stdout, if anywhere."""
        if self._output == _COMMITTED:
            return RESULTS / self.machine.slug / f"{self.benchmark}.jsonl"
        return None if self._output is None else Path(self._output)

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.prints_json and self.metrics:
            print_table(self.metrics)
        if error is None and self.output_path is not None:
            write_metrics(self.metrics, self.output_path)


def print_table(metrics: list[Metric]) -> None:
    """Print metrics to stdout as a table, under the machine and the commit of the first."""
    first = metrics[0]
    title = f"{first.metric.partition('.')[0]} · {first.machine.get('slug', 'unknown machine')} · commit {first.commit}"
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    console.print(metrics_table(metrics, title))
