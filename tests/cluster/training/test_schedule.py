import pytest

from cluster.training.schedule import learning_rate_at, router_warmup_at, weight_decay_at


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.3 / 10),  # the first step of the warm-up learns already
        (9, 0.3),  # its last one reaches the peak
        (10, 0.3),
        (49, 0.3 * 61 / 100),
        (55, 0.2 * 55 / 100),  # half-way: the lower line
        (109, 0.2 * 1 / 100),  # nearly 0
    ],
)
def test_learning_rate_at_the_corners(step, expected):
    assert learning_rate_at(step, num_steps=110, warmup_steps=10, peak_learning_rate=0.3) == pytest.approx(expected)


def test_learning_rate_rises_once_and_falls_ever_after():
    rates = [learning_rate_at(step, 101, 7, 1.0) for step in range(101)]
    assert rates[:7] == sorted(rates[:7])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert min(rates) > 0
    assert max(rates) == 1.0


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_short_runs_without_warmup_start_at_the_peak(num_steps):
    assert learning_rate_at(0, num_steps, 0, 0.5) == 0.5


def test_weight_decay_ends_half_way():
    assert [weight_decay_at(step, 4, 0.1) for step in range(4)] == [0.1, 0.1, 0.0, 0.0]
    assert [weight_decay_at(step, 5, 0.1) for step in range(5)] == [0.1, 0.1, 0.1, 0.0, 0.0]


def test_routers_warm_up_in_a_line_and_stay_there():
    assert [router_warmup_at(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert router_warmup_at(0, 0) == 1
