import json
import math

import pytest
import torch

from cluster.training.metrics import (
    METRICS_NAME,
    MetricsLog,
    drop_lines_after,
    evaluation_line,
    load_coefficient_of_variation,
    read_losses,
    scalars,
    training_line,
)


def lines_of(folder):
    return [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]


def a_line(step):
    return training_line(
        step=step,
        tokens=step * 64,
        losses=(3.0, 1.0, 2.0),
        learning_rate=0.1,
        tokens_per_s=1000.0,
        tokens_per_expert=torch.tensor([[8, 8], [16, 0]]),
        gradient_norm=0.5,
        dispatch_bytes=0.0,
        elapsed_s=step / 2,
    )


def test_lines_have_the_promised_keys():
    assert set(a_line(1)) == {
        "step",
        "tokens",
        "loss",
        "load_balance_loss",
        "router_z_loss",
        "learning_rate",
        "tokens_per_s",
        "expert_load_cv",
        "expert_load_min",
        "expert_load_max",
        "num_idle_experts",
        "gradient_norm",
        "dispatch_bytes",
        "elapsed_s",
    }
    evaluation = evaluation_line(step=1, tokens=64, loss=0.0, elapsed_s=1.0)
    assert evaluation == {"step": 1, "tokens": 64, "validation_loss": 0.0, "validation_ppl": 1.0, "elapsed_s": 1.0}
    json.dumps(evaluation_line(step=1, tokens=64, loss=1e6, elapsed_s=1.0), allow_nan=False)


def test_loads_are_multiples_of_the_even_share_and_idle_experts_are_counted():
    line = a_line(1)
    assert (line["expert_load_min"], line["expert_load_max"]) == ([1.0, 0.0], [1.0, 2.0])
    assert line["num_idle_experts"] == 1


def test_tensorboard_gets_one_number_a_layer():
    found = dict(scalars(a_line(1)))
    assert found["train/ppl"] == pytest.approx(math.exp(3.0))
    assert found["train/expert_load_max/layer_1"] == 2.0
    assert "train/step" not in found
    assert all(isinstance(value, (int, float)) for value in found.values())
    line = evaluation_line(step=1, tokens=64, loss=1.0, elapsed_s=1.0, expert_load=[[0.5, 0.5], [1.0, 0.0]])
    found = dict(scalars(line))
    assert found["validation/expert_load_cv/layer_0"] == 0
    assert found["validation/expert_load_cv/layer_1"] == 1
    assert found["validation/ppl"] == pytest.approx(math.e)


def test_losses_end_at_the_step_that_is_resumed(tmp_path):
    assert read_losses(tmp_path / METRICS_NAME, 3, 2) == []
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.append({**a_line(step), "loss": float(step)})
            log.append(evaluation_line(step=step, tokens=64, loss=9.0, elapsed_s=1.0))
    assert read_losses(tmp_path / METRICS_NAME, 3, 2) == [2.0, 3.0]


def test_load_variation_is_zero_when_even_and_one_when_half_idle():
    assert load_coefficient_of_variation(torch.tensor([[5, 5, 5]])) == 0
    assert load_coefficient_of_variation(torch.tensor([[4, 0], [2, 2]])) == pytest.approx(0.5)


def test_a_line_is_readable_at_once(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.append(a_line(1))
        assert lines_of(tmp_path) == [a_line(1)]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_resuming_drops_later_and_damaged_lines(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.append(a_line(step))
        log.append(evaluation_line(step=2, tokens=128, loss=1.0, elapsed_s=1.0))
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('{"step": 2, "tok')
    with MetricsLog(tmp_path, 2) as log:
        assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 2]
        log.append(a_line(3))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 2, 3]


def test_starting_over_drops_everything(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.append(a_line(1))
    MetricsLog(tmp_path, 0).close()
    assert lines_of(tmp_path) == []


def test_a_missing_file_stays_missing(tmp_path):
    drop_lines_after(tmp_path / METRICS_NAME, 3)
    assert not (tmp_path / METRICS_NAME).exists()
