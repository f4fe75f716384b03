import pytest

from benchmarks.grouped_bars import Panel, plot_bars
from benchmarks.metrics import Metric
from moe_bitnet.errors import DataError

SOURCE = Metric("example.bytes", 1.0, "bytes")
PANELS = [
    Panel("one series", ["a", "b $x"], {"": [1.0, 2000.0]}, upper_ends=[1.5, 2500.0]),
    Panel("two series", ["a", "b", "c"], {"sent": [1.0, 2.0, 0.5], "counted": [1.0, 2.5, 3.0]}),
]


@pytest.mark.parametrize("is_logarithmic", [False, True])
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_drawing_is_written(tmp_path, suffix, start, is_logarithmic):
    path = tmp_path / "plots" / f"bars{suffix}"
    plot_bars(PANELS, path, "Example", "bytes", SOURCE, is_logarithmic=is_logarithmic)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("panels", [[], [Panel("empty", [], {"": []})], [Panel("no series", ["a"], {})]])
def test_nothing_to_draw_is_an_error(tmp_path, panels):
    with pytest.raises(DataError, match="nothing to draw"):
        plot_bars(panels, tmp_path / "bars.png", "Example", "bytes", SOURCE)
