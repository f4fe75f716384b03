import math

import pytest
import torch
from torch import nn

from cluster.training.divergence import (
    NUM_WATCHED_LOSSES,
    LossWatch,
    check_finite,
    check_finite_parameters,
    first_non_finite,
)
from moe_bitnet.errors import TrainingError


def watch_of(losses, max_rise=2.0):
    watch = LossWatch(max_rise)
    for step, loss in enumerate(losses, start=1):
        watch.check(step, loss)
    return watch


def test_a_spike_names_step_loss_median_norm_and_what_to_do():
    watch = watch_of([5.0, 4.0, 3.0])
    with pytest.raises(
        TrainingError, match=r"step 4: the loss rose to 6\.500, 2\.50 nats above 4\.000.*last 3"
    ) as error:
        watch.check(4, 6.5, gradient_norm=123.4)
    assert "123" in str(error.value)
    assert "peak_learning_rate" in str(error.value)
    assert "max_loss_rise" in str(error.value)


@pytest.mark.parametrize("losses", [[8.0], [8.0, 9.9], [3.0, 3.0, 4.9, 3.0, 2.0], [5.0, 4.0, 4.0, 5.9]])
def test_noise_below_the_limit_passes(losses):
    watch_of(losses)


def test_the_median_forgets_what_is_long_ago():
    watch = watch_of([9.0] * NUM_WATCHED_LOSSES + [8.0 - step / 50 for step in range(200)])
    with pytest.raises(TrainingError, match="above 4"):
        watch.check(251, 8.0)


def test_one_outlier_does_not_lift_the_median():
    watch = watch_of([3.0] * 9 + [4.9])
    with pytest.raises(TrainingError):
        watch.check(11, 5.1)


def test_without_a_limit_nothing_stops_and_all_is_calm():
    assert watch_of([1.0, 100.0], max_rise=None).is_calm


def test_a_loss_half_way_to_the_limit_is_not_calm_until_it_comes_back():
    watch = watch_of([3.0, 3.0, 3.0, 4.1])
    assert not watch.is_calm
    watch.check(5, 3.9)
    assert watch.is_calm


def test_a_resumed_run_remembers_the_losses_before():
    with pytest.raises(TrainingError, match="last 2 steps"):
        LossWatch(2.0, [3.0, 3.2]).check(3, 6.0)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_the_first_tensor_that_is_not_finite_is_named(model):
    assert first_non_finite(model) is None
    check_finite(1, (1.0, 2.0, 3.0), model)
    check_finite_parameters(1, model)
    model[1].bias.grad = torch.tensor([math.inf])
    with pytest.raises(TrainingError, match=r"step 7: gradient of 1\.bias"):
        check_finite_parameters(7, model)
    with torch.no_grad():
        model[0].weight[1, 2] = math.nan
    with pytest.raises(TrainingError, match=r"step 8.*parameter 0\.weight.*update before"):
        check_finite(8, (math.nan, 1.0, 1.0), model)


def test_an_overflow_of_finite_parameters_is_told_apart(model):
    with pytest.raises(TrainingError, match="overflowed in the forward pass"):
        check_finite(3, (1.0, 1.0, math.inf), model)
