import itertools

import pytest

from benchmarks import timing
from benchmarks.disturbance import CpuTimes
from benchmarks.timing import Comparison, Timing, compare, median_time, quantile


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE_BEFORE_REPEAT_S", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that functions advance; ``clock(3.0)`` makes 3 s pass."""

    class Clock:
        now_s = 0.0

        def __call__(self, seconds):
            self.now_s += seconds

    instance = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: instance.now_s)
    return instance


@pytest.fixture
def others(monkeypatch):
    """A function that sets the shares which other processes use, one a figure."""

    def set_shares(*shares):
        readings = itertools.chain.from_iterable(
            (CpuTimes(0.0, 10.0 * i, 0.0), CpuTimes(10.0 * share, 10.0 * i + 10.0, 0.0))
            for i, share in enumerate(shares)
        )
        monkeypatch.setattr(timing, "read_cpu_times", lambda: next(readings, None))

    set_shares()
    return set_shares


def test_median_and_spread():
    result = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 11.0, 6.0, 7.0, 8.0, 9.0, 10.0))
    assert (result.median_s, result.min_s, result.p10_s, result.p90_s) == (6.0, 1.0, 2.0, 10.0)


def test_quantiles_are_interpolated():
    assert quantile((0.0, 10.0), 0.25) == 2.5
    assert quantile((7.0,), 0.9) == 7.0


def test_warmups_are_not_counted(clock, others):
    seconds = iter([100.0, 100.0, 3.0, 1.0, 2.0])
    result = median_time(lambda: clock(next(seconds)), num_runs=3, num_warmups=2)
    assert result.samples_s == (3.0, 1.0, 2.0)
    assert result.median_s == 2.0
    assert result.other_cpu_share is None


def test_candidates_take_turns_and_each_starts_a_round(others):
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    compare(candidates, num_rounds=4, num_settling_calls=0, num_warmups=0)
    assert "".join(calls) == "abcbcacababc"


def test_settling_calls_are_not_timed(clock, others):
    calls = itertools.count()
    result = compare(
        {"a": lambda: clock(100.0 if next(calls) % 3 == 0 else 1.0)},
        num_rounds=5, num_calls=2, num_settling_calls=1, num_warmups=0,
    )  # fmt: skip
    assert result["a"].samples_s == (1.0,) * 10


def test_a_speedup_is_taken_turn_by_turn():
    """The machine is ten times slower in the second half: a ratio of medians would not see that both are."""
    slow, fast = Timing((2.0, 2.0, 2.0, 20.0, 20.0)), Timing((1.0, 1.0, 10.0, 10.0, 10.0))
    assert Comparison({"slow": slow, "fast": fast}).speedup("fast", "slow") == 2.0


def test_a_turn_of_several_calls_counts_by_its_median():
    slow, fast = Timing((4.0, 4.0, 400.0, 8.0, 8.0, 8.0)), Timing((2.0, 2.0, 2.0, 4.0, 0.1, 4.0))
    assert Comparison({"slow": slow, "fast": fast}, num_calls=3).speedup("fast", "slow") == 2.0


def test_a_disturbed_figure_is_measured_again(others):
    others(0.5, 0.01)
    result = median_time(lambda: None, num_runs=3)
    assert result.other_cpu_share == pytest.approx(0.01)
    assert result.num_repeats == 1


def test_the_least_disturbed_figure_is_kept(clock, others):
    others(0.5, 0.2, 0.4, 0.3)
    figures = itertools.count(1)
    result = median_time(lambda: clock(next(figures)), num_runs=1, num_warmups=0, max_repeats=3)
    assert result.samples_s == (2.0,)
    assert result.other_cpu_share == pytest.approx(0.2)
    assert result.num_repeats == 3


def test_detail_is_flat_and_names_its_units():
    assert set(Timing((1.0,)).to_detail()) == {
        "median_s", "min_s", "p10_s", "p90_s", "num_samples", "other_cpu_share", "num_repeats",
    }  # fmt: skip
