import dataclasses

import pytest

from benchmarks.metrics import Metric
from benchmarks.training_plots import plot_training_quality
from benchmarks.training_speed_plot import plot_training_speed
from moe_bitnet.errors import DataError


def quality(name, value, **detail):
    detail = {"corpus": "code", "size": "small", "precision": "ternary", **detail}
    return Metric(f"training_quality.{name}", value, "PPL", detail=detail)


QUALITY = [
    quality("validation_ppl", 30.0, bytes=10**6, active_parameters=10**6, losses_by_seed=[3.3, 3.5]),
    quality("ppl_vs_twin", 0.9, by_seed=[0.88, 0.92]),
    quality("sweep_ppl", 31.0, peak_learning_rate=4e-3, steps=10),
]
SPEED = [
    Metric("training_speed.tokens_per_cpu_s", 3000.0, "1/s", detail={"precision": "ternary", "at_least": 2700}),
    Metric("training_speed.ep_vs_dp_step", 1.1, "ratio", baseline="", baseline_value=0.3),
    Metric("training_speed.dispatch_bytes_vs_formula", 1.0, "ratio", "", 1e6, detail={"bytes_per_step": 1e6}),
]


@pytest.mark.parametrize(("plot", "metrics"), [(plot_training_quality, QUALITY), (plot_training_speed, SPEED)])
def test_a_drawing_shows_what_there_is(plot, metrics, tmp_path):
    plot(metrics, tmp_path / "whole.png")
    plot(metrics[:1], tmp_path / "part.png")
    whole, part = ((tmp_path / name).read_bytes() for name in ("whole.png", "part.png"))
    assert whole[:8] == part[:8] == b"\x89PNG\r\n\x1a\n"
    assert whole != part


@pytest.mark.parametrize(("plot", "metrics"), [(plot_training_quality, QUALITY), (plot_training_speed, SPEED)])
def test_metrics_of_others_are_refused(plot, metrics, tmp_path):
    others = [dataclasses.replace(metric, metric="other.thing") for metric in metrics]
    with pytest.raises(DataError, match="Give others"):
        plot(others, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
