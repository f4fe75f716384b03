import io
import json

import pytest
from rich.console import Console

from cluster.training.attempts import Attempt, append_attempt
from cluster.training.config import TrainConfig
from moe_bitnet.cli import train_view
from moe_bitnet.cli.train_progress import RunProgress
from moe_bitnet.cli.train_view import describe_line, render_panel, training_view


def training_line(step, **changes):
    line = {
        "step": step,
        "tokens": 512 * step,
        "loss": 4.0 - step / 100,
        "learning_rate": 8e-3,
        "tokens_per_s": 1000.0,
        "expert_load_cv": 0.25,
        "expert_load_min": [0.5, 0.0],
        "expert_load_max": [1.5, 3.0],
        "num_idle_experts": 1,
        "gradient_norm": 0.5,
        "dispatch_bytes": 1.9e6,
        "elapsed_s": 2.0 * step,
    }
    return {**line, **changes}


def evaluation_line(step):
    load = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]]
    return {"step": step, "tokens": 9, "validation_loss": 3.5, "validation_ppl": 33.1, "expert_load": load}


@pytest.fixture
def progress(tmp_path):
    return RunProgress(100, tmp_path)


def drawn(progress):
    text = io.StringIO()
    Console(file=text, width=90, force_terminal=False).print(render_panel("train ternary", progress))
    return text.getvalue()


def test_before_the_first_step_the_panel_says_what_is_waited_for(progress):
    assert "waiting" in drawn(progress)


def test_the_panel_shows_what_is_known(progress, tmp_path):
    append_attempt(tmp_path, Attempt("a", "2030-01-01T00:00:00+00:00", 2, "cpu"))
    append_attempt(tmp_path, Attempt("a", "2030-01-01T00:00:09+00:00", 2, "cpu"))
    (tmp_path / "checkpoints" / "step_000015").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_000020.new").mkdir()
    for step in range(1, 21):
        progress.take(training_line(step))
    text = drawn(progress)
    for part in ("step 20/100", "3.800", "1.0k tok/s", "2 min 40 s left", "8.00e-03", "0.5", "1.9 MB a step"):
        assert part in text
    assert "0.00 – 3.00" in text
    assert "━" not in next(line for line in text.splitlines() if "loss" in line), "the bar has a line of its own"
    assert "1 idle" in text
    progress.files._num_before = 0  # as if it had been started before the workers
    progress.take(evaluation_line(20))
    progress.files.look()
    text = drawn(progress)
    for part in ("PPL 33.1", "▅▅▅▅", "██··", "2 dead", "2   1 restarts", "after step 15"):
        assert part in text


def test_many_layers_are_not_all_drawn(progress):
    progress.take(training_line(1, expert_load_min=[0.5] * 30, expert_load_max=[1.5] * 30))
    text = drawn(progress)
    assert "and 22 layers more" in text
    assert len(text.splitlines()) < 24


def test_workers_that_start_again_go_back_and_the_pace_is_measured_anew(progress):
    for step in (*range(1, 11), 6):
        progress.take(training_line(step, elapsed_s=100.0 * step))
    assert progress.step == 6
    assert progress.remaining_s is None
    progress.take(training_line(7, elapsed_s=603.0))
    assert progress.remaining_s == pytest.approx(93 * 3)


def test_a_line_of_an_older_run_is_enough(progress):
    old = ("step", "tokens", "loss", "learning_rate", "tokens_per_s", "expert_load_cv", "elapsed_s")
    line = {name: value for name, value in training_line(3).items() if name in old}
    progress.take(line)
    assert "dispatch" not in describe_line(progress, line)
    assert "dispatch" not in drawn(progress)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(tmp_path, tmp_path, num_steps=100)


def test_without_a_terminal_each_step_is_one_line(config, capsys, monkeypatch):
    monkeypatch.setattr(train_view.console, "_force_terminal", False)
    with training_view("train", config) as on_line:
        for line in (training_line(1), training_line(2), evaluation_line(2)):
            on_line(line)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 2/100", "step 2/100"]
    assert "loss 3.990" in lines[0]
    assert "dispatch 1.9 MB/step" in lines[0]
    assert "validation loss 3.500" in lines[2]


def test_json_is_the_lines_as_they_are_and_off_is_nothing(config, capsys):
    with training_view("train", config, "json") as on_line:
        on_line(training_line(1))
    captured = capsys.readouterr()
    assert json.loads(captured.err) == training_line(1)
    assert captured.out == ""
    with training_view("train", config, "off") as on_line:
        assert on_line is None
