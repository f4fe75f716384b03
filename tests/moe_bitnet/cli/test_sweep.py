import io
import json

import pytest
from rich.console import Console

from cluster.training.stopping import request_stop
from cluster.training.sweep import CellResult, check_cell, finished, run_cell
from moe_bitnet.cli.main import main
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.reporting.sweep_plot import SweepPoint, best_points, sweep_png
from moe_bitnet.cli.sweep import print_table, row_of
from moe_bitnet.cli.sweep_grid import Grid, read_grid
from moe_bitnet.errors import ConfigError

GRID = """
[sweep]
sizes = ["tiny", "wide", "own"]
precisions = ["ternary", "float"]
learning_rates = [4e-3]
seeds = [0, 1]
[sizes.wide]
preset = "tiny"
hidden_size = 64
[sizes.own]
hidden_size = 16
intermediate_size = 16
num_layers = 1
num_heads = 1
num_kv_heads = 1
[train]
num_steps = 7
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return path

    return write


def cells_of(grid, tmp_path):
    return grid.cells(tmp_path / "data", 300, tmp_path / "cells", 1)


def test_a_grid_is_every_combination_in_a_folder_of_its_own(write, tmp_path):
    cells = cells_of(read_grid(write(GRID)), tmp_path)
    assert len({cell.folder for cell in cells}) == len(cells) == 12
    assert cells[0].name == "tiny-ternary-lr0.004-seed0"
    wide = next(cell for cell in cells if cell.size == "wide")
    assert wide.model_config.hidden_size == 64
    assert wide.model_config.num_experts == PRESETS["tiny"].shape["num_experts"]
    assert {cell.train_config.seed for cell in cells} == {0, 1}
    assert {cell.train_config.num_steps for cell in cells} == {7}


def test_options_override_the_file_and_rates_are_the_best_known(write, tmp_path):
    path = write('[sweep]\nsizes = ["demo"]\nprecisions = ["float"]\n')
    cells = cells_of(read_grid(path, sizes=["tiny"], precisions=None, learning_rates=None, seeds=[5]), tmp_path)
    assert [cell.name for cell in cells] == ["tiny-float-lr0.004-seed5"]
    assert cells[0].train_config.num_steps == PRESETS["tiny"].num_steps
    assert len(cells_of(read_grid(None), tmp_path)) == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[sweep]\nsize = ["tiny"]\n', ["size", "sizes, precisions"]),
        ('[sweep]\nprecisions = ["fp8"]\n', ["fp8", "ternary, float"]),
        ("[sweep]\nseeds = 3\n", ["seeds is 3", "list"]),
        ('[sweep]\nseeds = ["x"]\n', ["seeds holds 'x'"]),
        ("[sizes.a]\nhiden = 3\n", ["[sizes.a]", "hiden"]),
        ("[sizes]\na = 3\n", ["[sizes.a]"]),
        ("[train]\nnum_workers = 2\n", ["num_workers", "[train]"]),
    ],
)
def test_what_a_grid_may_not_hold_is_named(write, text, words):
    with pytest.raises(ConfigError) as error:
        read_grid(write(text))
    for word in words:
        assert word in str(error.value)


def test_a_size_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'huge'.*tiny, demo, small"):
        cells_of(Grid(sizes=("huge",)), tmp_path)


@pytest.fixture
def cell(filled_run, tmp_path):
    grid = Grid(sizes=("tiny",), precisions=("float",), train={"num_steps": 2, "is_compiled": False})
    return grid.cells(filled_run.data, filled_run.load_tokenizer().vocab_size, tmp_path / "cells", 1)[0]


def test_a_finished_cell_is_known_and_another_one_in_its_folder_refused(cell):
    assert finished(cell) is None
    result = run_cell(cell)
    assert result.summary["num_steps"] == 2
    assert finished(cell) == CellResult(json.loads(json.dumps(result.summary)))
    check_cell(cell)
    other = type(cell)(cell.size, cell.model_config, cell.train_config.replace(num_steps=3))
    with pytest.raises(ConfigError, match="num_steps"):
        check_cell(other)
    assert "num_steps" in run_cell(other).error


def test_a_cell_that_was_asked_to_stop_does_not_begin(cell):
    request_stop(cell.folder)
    assert run_cell(cell) == CellResult()
    assert not (cell.folder / "cell.json").exists()


def test_a_cell_that_diverges_is_a_result(cell):
    too_fast = cell.train_config.replace(peak_learning_rate=30.0, warmup_steps=0, max_loss_rise=0.5, num_steps=30)
    changed = type(cell)(cell.size, cell.model_config, too_fast)
    result = run_cell(changed)
    assert "the loss rose" in result.error
    row = row_of(changed, result)
    assert row["validation_loss"] is None
    text = io.StringIO()
    print_table([row], Console(file=text, width=120))
    assert "failed" in text.getvalue()


def test_a_size_stands_at_its_best_rate_with_the_mean_of_its_seeds():
    points = [
        SweepPoint("FP16", "small", rate, 100, loss) for rate, loss in ((1, 3.0), (1, 3.2), (2, 2.9), (2, 3.5))
    ] + [SweepPoint("FP16", "tiny", 1, 50, 4.0), SweepPoint("binary", "tiny", 1, 5, 5.0)]
    assert best_points(points) == {"FP16": [(50, 4.0), (100, pytest.approx(3.1))], "binary": [(5, 5.0)]}
    assert sweep_png(points).startswith(b"\x89PNG")


@pytest.mark.ray
def test_a_sweep_trains_its_cells_and_uses_them_again(filled_run, tmp_path, capsys):
    arguments = ["sweep", "--run", str(filled_run.path), "--out", str(tmp_path / "sweep"), "--sizes", "tiny"]
    arguments += ["--precisions", "ternary", "float", "--steps", "3", "--no-compile", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert [cell["precision"] for cell in first["cells"]] == ["ternary", "float"]
    assert all(cell["validation_loss"] > 0 and not cell["error"] for cell in first["cells"])
    assert set(first["cells"][0]["bytes"]) == {"ternary 2bit", "ternary base3"}
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert rows == first["cells"]
    assert (tmp_path / "sweep" / "loss_against_bytes.png").is_file()
    assert main(arguments) == 0, "without Ray, since all is finished"
    assert json.loads(capsys.readouterr().out) == first
