import dataclasses
import subprocess
import sys

import pytest

from benchmarks.training_cells import read_finished, run_cells
from benchmarks.training_plan import Cell
from benchmarks.training_quality import _build_data
from cluster.training.corpus import collect_documents
from moe_bitnet.errors import TrainingError
from moe_bitnet.files import write_json_atomically

FIRST = Cell("code", "quick", "ternary", 1e-2, 0, 2)
SECOND = dataclasses.replace(FIRST, precision="float")


def grow(losses):
    """A second cell is known when the first is finished."""
    return [FIRST, SECOND] if FIRST in losses else [FIRST]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    _build_data("code", lambda: collect_documents([], max_bytes=1_200_000).documents, folder)
    return folder


def test_a_plan_grows_with_what_is_finished_and_nothing_is_trained_twice(folder):
    lines = []
    results = run_cells(grow, folder, 2, True, lines.append)
    assert list(results) == [FIRST, SECOND]
    assert [line.partition(":")[0] for line in lines] == [FIRST.name, SECOND.name]
    assert results[SECOND]["rounded_validation_loss"] > 0
    assert "rounded_validation_loss" not in results[FIRST]
    assert run_cells(grow, folder, 2, True, lines.append) == read_finished(grow, folder) == results
    assert len(lines) == 2


def test_a_cell_that_fails_is_named(tmp_path):
    with pytest.raises(TrainingError, match=rf"{FIRST.name} ended with status 1: .*holds no summary"):
        run_cells(lambda losses: [FIRST], tmp_path, 1, True, print)
    assert read_finished(grow, tmp_path) == {}


def test_only_what_is_finished_is_reported(tmp_path):
    result = {"validation_loss": 3.0, "validation_ppl": 20.1, "train_s": 3600.0}
    write_json_atomically(tmp_path / "code-small-float-lr0.001-seed0-7steps" / "result.json", result)
    command = ["-m", "benchmarks.training_quality", "--finished", "--steps", "7", "--folder", str(tmp_path), "--json"]
    lines = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert '"training_quality.hours_on_two_cores", "value": 0.5' in lines[0]
    assert '"training_quality.sweep_ppl", "value": 20.1' in lines[1]
