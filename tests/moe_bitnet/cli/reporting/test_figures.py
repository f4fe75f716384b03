import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_bitnet.cli.reporting import Results, load_results, save_plot_png, to_report
from moe_bitnet.cli.reporting.figures import LIGHT, panel_svg
from moe_bitnet.cli.reporting.html import render_html
from moe_bitnet.cli.reporting.plots import PANELS, draw_devices, draw_traffic


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def assert_reportable(results: Results) -> None:
    json.dumps(to_report(results), allow_nan=False)
    assert render_html(results).endswith("</html>\n")


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_overview_is_a_png_of_1600_by_900(run_folder: Path, tmp_path: Path) -> None:
    save_plot_png(load_results(run_folder), tmp_path / "new" / "overview.png")
    assert png_size(tmp_path / "new" / "overview.png") == (1600, 900)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["overview.png"]


def test_overview_of_an_empty_run_is_still_a_picture(tmp_path: Path) -> None:
    save_plot_png(load_results(tmp_path), tmp_path / "overview.png")
    assert png_size(tmp_path / "overview.png") == (1600, 900)


def test_drawings_are_reproducible(run_folder: Path) -> None:
    results = load_results(run_folder)
    for panel in PANELS:
        assert panel_svg(panel, results, "x") == panel_svg(panel, results, "x")


def test_settings_of_matplotlib_are_left_as_they_were(run_folder: Path) -> None:
    before = dict(mpl.rcParams)
    panel_svg(PANELS[0], load_results(run_folder), "x")
    assert dict(mpl.rcParams) == before


def test_one_block_is_drawn_for_each_device(run_folder: Path) -> None:
    axes = Figure().add_subplot()
    draw_devices(axes, load_results(run_folder), LIGHT)
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [4, 1]


def test_far_apart_traffic_is_drawn_on_a_logarithmic_axis(run_folder: Path) -> None:
    edit(run_folder / "generate.json", lambda value: value["runs"][2].update(bytes_per_token=3.0))
    axes = Figure().add_subplot()
    draw_traffic(axes, load_results(run_folder), LIGHT)
    assert axes.get_xscale() == "log"
    assert any(text.get_text() == "0" for text in axes.texts)
    assert any("logarithmic" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("generate.json", lambda value: value.update(runs=[])),
        ("generate.json", lambda value: [run.update(bytes_per_token=0.0) for run in value["runs"]]),
        ("generate.json", lambda value: [run.update(bytes_per_token=math.nan, num_tokens=0) for run in value["runs"]]),
        ("generate.json", lambda value: value.update(runs=value["runs"][1:])),
        ("generate.json", lambda value: value.update(runs=value["runs"][:1])),
        ("context.json", lambda value: value.update(formats=[])),
        ("context.json", lambda value: value.update(formats=value["formats"][1:])),
        ("context.json", lambda value: value["formats"][0].update(num_tokens=0)),
        ("pack.json", lambda value: value.update(layouts=[])),
        ("pack.json", lambda value: value.update(fp16_file_bytes=0, fp16_expert_bytes=0)),
        ("place.json", lambda value: value["float16"].update(num_devices=0)),
        ("place.json", lambda value: value["float16"].update(num_devices=700)),
        ("ternary/summary.json", lambda value: value.update(expert_load=[])),
        ("ternary/summary.json", lambda value: value.update(expert_load=[[], []])),
        ("ternary/summary.json", lambda value: value.update(expert_load=[[1.0]])),
        ("ternary/summary.json", lambda value: value.update(expert_load=[[0.0, 0.0], [math.nan, 1.0]])),
        ("ternary/summary.json", lambda value: value.update(expert_load=[[1 / 64] * 64] * 40)),
    ],
)  # fmt: skip
def test_odd_results_still_make_a_report(run_folder: Path, name: str, change: Callable[[Any], None]) -> None:
    edit(run_folder / name, change)
    assert_reportable(load_results(run_folder))


@pytest.mark.parametrize(
    "text", ["", '{"step": 1, "tokens": 1, "validation_loss": NaN, "validation_ppl": NaN, "elapsed_s": 1}']
)
def test_a_history_without_losses_still_makes_a_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "ternary").mkdir()
    (tmp_path / "ternary" / "metrics.jsonl").write_text(text)
    assert_reportable(load_results(tmp_path))
