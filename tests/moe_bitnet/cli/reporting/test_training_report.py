import json
import math
import re

import pytest

from cluster.training.attempts import Attempt, append_attempt
from moe_bitnet.cli.reporting.figures import drawings_png
from moe_bitnet.cli.reporting.summary import load_training
from moe_bitnet.cli.reporting.training_curves import training_drawings
from moe_bitnet.cli.reporting.training_report import write_training_report
from moe_bitnet.errors import DataError

LOADS = {"expert_load_min": [0.5, 0.0], "expert_load_max": [1.5, 3.0], "num_idle_experts": 1}


def training_line(step, **changes):
    line = {
        "step": step,
        "tokens": 512 * step,
        "loss": 5.0 - math.log(step),
        "load_balance_loss": 1.0,
        "router_z_loss": 1.0,
        "learning_rate": 8e-3 / step,
        "tokens_per_s": 1000.0,
        "expert_load_cv": 0.25,
        "elapsed_s": 2.0 * step,
    }
    return {**line, **changes}


def evaluation_line(step):
    load = [[0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]]
    return {
        "step": step,
        "tokens": 9,
        "validation_loss": 3.5,
        "validation_ppl": 33.1,
        "elapsed_s": 2.0 * step,
        "expert_load": load,
    }


def write_metrics(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def interrupted(tmp_path):
    """An interrupted run of two attempts, whose last line is cut off."""
    new = {"gradient_norm": 0.5, "dispatch_bytes": 2e6, **LOADS}
    write_metrics(tmp_path, [training_line(step, **new) for step in range(1, 251)] + [evaluation_line(250)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 251, "lo')
    for at in ("2030-01-01T00:00:00+00:00", "2030-01-01T00:10:00+00:00"):
        append_attempt(tmp_path, Attempt("a", at, 2, "cpu"))
    (tmp_path / "settings.json").write_text(json.dumps({"model": {"num_layers": 2}, "training": {"seed": None}}))
    return tmp_path


def test_an_interrupted_run_has_a_report_of_what_there_is(interrupted):
    numbers = write_training_report(interrupted)
    assert (numbers["is_finished"], numbers["step"], numbers["num_starts"]) == (False, 250, 2)
    assert numbers["validation_loss"] == 3.5
    assert numbers["num_dead_experts"] == 1
    page = (interrupted / "report.html").read_text()
    for part in (
        "has not come to its end",
        "250",
        "33.10",
        "started 2 times",
        "2 workers on cpu",
        "num_layers",
        "2 MB",
    ):
        assert part in page
    assert (interrupted / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_from_elsewhere_and_its_ids_are_unique(interrupted):
    write_training_report(interrupted)
    page = (interrupted / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_a_run_has_the_curves_that_it_has_numbers_for(interrupted, tmp_path):
    names = [drawing.name for drawing in training_drawings(load_training(interrupted))]
    assert names == ["loss", "rate", "speed", "gradient", "busiest", "dispatch"]
    old = tmp_path / "old"
    old.mkdir()
    write_metrics(old, [training_line(1)])
    drawings = training_drawings(load_training(old))
    assert [drawing.name for drawing in drawings] == ["loss", "rate", "speed"]
    assert drawings_png("one step", drawings).startswith(b"\x89PNG")
    write_training_report(old)
    assert "expert load" not in (old / "report.html").read_text().lower()


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no metrics"):
        write_training_report(tmp_path)
    write_metrics(tmp_path, [{"step": "one", "loss": 3.0}])
    with pytest.raises(DataError, match=r"metrics\.jsonl.*step"):
        write_training_report(tmp_path)
