import pytest

from benchmarks.disturbance import CpuTimes, other_cpu_share, parse_stat, read_cpu_times


def test_guest_time_is_not_counted_twice():
    #            user nice system idle iowait irq softirq steal guest guest_nice
    line = "cpu  100 20 30 700 50 1 2 97 60 7"
    assert parse_stat(line, ticks_per_s=100) == (2.5, 10.0)


def test_own_work_is_no_disturbance():
    before, after = CpuTimes(5.0, 100.0, 1.0), CpuTimes(8.0, 110.0, 4.0)
    assert other_cpu_share(before, after) == 0.0
    assert other_cpu_share(before, CpuTimes(8.0, 110.0, 2.0)) == pytest.approx(0.2)


def test_a_share_stays_within_its_range():
    assert other_cpu_share(CpuTimes(0.0, 0.0, 0.0), CpuTimes(1.0, 10.0, 1.5)) == 0.0


def test_an_unknown_share_is_none():
    assert other_cpu_share(None, CpuTimes(1.0, 1.0, 1.0)) is None
    assert other_cpu_share(CpuTimes(1.0, 1.0, 1.0), CpuTimes(1.0, 1.0, 1.0)) is None


def test_readings_never_fall():
    first, second = read_cpu_times(), read_cpu_times()
    if first is None:
        pytest.skip("this system has no /proc/stat")
    assert second.total_s >= first.total_s
    assert second.own_s >= first.own_s
