import pytest

from benchmarks.metrics import Metric
from benchmarks.plots import plot_shares
from moe_bitnet.errors import DataError

METRICS = [
    Metric("example.share", 0.9, "ratio", detail={"format": "$2bit$", "at_least": 0.85}),
    Metric("example.slower", 3.0, "ratio", detail={"at_most": 2.5}),
    Metric("example.plain", 0.0, "ratio"),
    Metric("example.time", 3.0, "s"),
    Metric("example.unknown", None, "ratio"),
]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_drawing_is_written(tmp_path, suffix, start):
    path = tmp_path / "plots" / f"shares{suffix}"
    plot_shares(METRICS, path)
    assert path.read_bytes().startswith(start)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(DataError, match="2 metrics"):
        plot_shares(METRICS[3:], tmp_path / "shares.png")
