"""Time functions: median and spread, several candidates in turns, disturbed figures again.

A shared machine changes speed from minute to minute, so candidates that are compared take
turns within one run, and their ratio is taken turn by turn. A figure during which other
processes used CPU is measured again a few times; the least disturbed one is kept, and it
says how disturbed it was.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.disturbance import other_cpu_share, read_cpu_times

MAX_OTHER_SHARE = 0.05
"""Other processes' share of all cores above which a figure is measured again."""

_PAUSE_BEFORE_REPEAT_S = 0.5

Function = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one function.

    Attributes:
        samples_s: seconds of each call, in order.
        other_cpu_share: CPU that other processes used meanwhile, as a share of all cores; ``None`` if unknown.
        num_repeats: figures that were thrown away as more disturbed.
    """

    samples_s: tuple[float, ...]
    other_cpu_share: float | None = None
    num_repeats: int = 0

    @property
    def median_s(self) -> float:
        """The middle of the samples."""
        return statistics.median(self.samples_s)

    @property
    def min_s(self) -> float:
        """The fastest sample."""
        return min(self.samples_s)

    @property
    def p10_s(self) -> float:
        """A tenth of the samples is at most this."""
        return quantile(self.samples_s, 0.1)

    @property
    def p90_s(self) -> float:
        """Nine tenths of the samples are at most this."""
        return quantile(self.samples_s, 0.9)

    def to_detail(self) -> dict[str, Any]:
        """Return median, spread and disturbance for a metric's ``detail``."""
        return {
            "median_s": self.median_s,
            "min_s": self.min_s,
            "p10_s": self.p10_s,
            "p90_s": self.p90_s,
            "num_samples": len(self.samples_s),
            "other_cpu_share": self.other_cpu_share,
            "num_repeats": self.num_repeats,
        }


@dataclass(frozen=True)
class Comparison:
    """Times of candidates that took turns.

    Attributes:
        timings: candidate to its times.
        num_calls: samples of each turn.
    """

    timings: Mapping[str, Timing]
    num_calls: int = 1

    def __getitem__(self, name: str) -> Timing:
        """Return the times of one candidate."""
        return self.timings[name]

    def speedup(self, name: str, baseline: str) -> float:
        """Return how many times faster ``name`` is than ``baseline``: the median over turns of the ratio in a turn."""
        pairs = zip(self._turn_medians(baseline), self._turn_medians(name), strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)

    def to_detail(self) -> dict[str, Any]:
        """Return the detail of every candidate, by name."""
        return {name: timing.to_detail() for name, timing in self.timings.items()}

    def _turn_medians(self, name: str) -> list[float]:
        samples_s = self.timings[name].samples_s
        starts = range(0, len(samples_s), self.num_calls)
        return [statistics.median(samples_s[start : start + self.num_calls]) for start in starts]


def median_time(
    function: Function,
    *,
    num_runs: int = 20,
    num_warmups: int = 3,
    max_other_share: float = MAX_OTHER_SHARE,
    max_repeats: int = 3,
) -> Timing:
    """Time a function again and again.

    Args:
        function: what to time; its result is dropped.
        num_runs: timed calls.
        num_warmups: calls before them, not timed.
        max_other_share: a figure with more CPU used by others is measured again.
        max_repeats: how often at most.
    """
    comparison = compare(
        {"function": function},
        num_rounds=num_runs,
        num_warmups=num_warmups,
        num_settling_calls=0,
        max_other_share=max_other_share,
        max_repeats=max_repeats,
    )
    return comparison["function"]


def compare(
    candidates: Mapping[str, Function],
    *,
    num_rounds: int = 10,
    num_calls: int = 1,
    num_settling_calls: int = 1,
    num_warmups: int = 2,
    max_other_share: float = MAX_OTHER_SHARE,
    max_repeats: int = 3,
) -> Comparison:
    """Time several functions in turns, so that a change of the machine's speed meets all of them.

    Args:
        candidates: name to function; a round gives each a turn, and the next round starts one further.
        num_rounds: turns of each candidate.
        num_calls: timed calls in a turn.
        num_settling_calls: untimed calls at the start of a turn, while caches refill and the threads
            of the candidate before stop spinning.
        num_warmups: untimed calls of each candidate before the first round.
        max_other_share: a figure with more CPU used by others is measured again.
        max_repeats: how often at most.
    """
    assert candidates, "compare needs a candidate"
    assert num_rounds > 0, "compare needs a round"
    assert num_calls > 0, "compare needs a call in a turn"
    for function in candidates.values():
        for _ in range(num_warmups):
            function()
    best: tuple[float, dict[str, list[float]], float | None] | None = None
    num_repeats = -1
    while best is None or (best[0] > max_other_share and num_repeats < max_repeats):
        if best is not None:
            time.sleep(_PAUSE_BEFORE_REPEAT_S)
        before = read_cpu_times()
        samples = _run_rounds(candidates, num_rounds, num_calls, num_settling_calls)
        share = other_cpu_share(before, read_cpu_times())
        num_repeats += 1
        if best is None or (share or 0.0) < best[0]:
            best = (share or 0.0, samples, share)
    _, samples, share = best
    return Comparison({name: Timing(tuple(samples[name]), share, num_repeats) for name in candidates}, num_calls)


def quantile(samples: tuple[float, ...], fraction: float) -> float:
    """Return the sample, interpolated, that ``fraction`` of the samples do not exceed."""
    ordered = sorted(samples)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _run_rounds(
    candidates: Mapping[str, Function], num_rounds: int, num_calls: int, num_settling_calls: int
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    with _collector_off():
        for turn in range(num_rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                function = candidates[name]
                for _ in range(num_settling_calls):
                    function()
                for _ in range(num_calls):
                    begin = time.perf_counter()
                    function()
                    samples[name].append(time.perf_counter() - begin)
    return samples


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
