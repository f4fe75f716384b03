import signal
import subprocess
import time

import pytest

from benchmarks.metrics import Metric
from benchmarks.recovery import LAYOUT, MODEL, Striker, place, write_text
from benchmarks.recovery_plot import plot_recovery
from benchmarks.synthetic import build_packed_model
from moe_bitnet.errors import DataError


@pytest.mark.parametrize("has_replicas", [True, False])
def test_no_expert_is_at_home_and_each_host_has_what_it_should(has_replicas):
    _, placement = place(has_replicas)
    assert placement.expert_ids_on(0, 0) == []
    assert len(placement.expert_ids_on(1, 0)) == MODEL.num_experts // (1 if has_replicas else 2)
    assert placement.has_replicas == has_replicas


def test_the_text_is_repeatable_and_does_not_stand_still():
    model = build_packed_model(MODEL, LAYOUT)
    first, second = (write_text(model, 12) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert len(first.gaps_s) == 12
    assert len(set(first.token_ids)) > 6


def test_a_striker_strikes_once_and_not_before_its_token():
    with subprocess.Popen(["sleep", "30"]) as process:
        striker = Striker(process.pid, signal.SIGKILL, after=3)
        for token_id in range(2):
            striker.on_token(token_id)
            time.sleep(0.02)
        assert process.poll() is None
        striker.on_token(2)
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_a_drawing_is_made_from_metrics_alone(tmp_path):
    detail = {"fault": "killed", "pauses": {"ms_between_tokens": [50.0, 3.0, 40.0, 3.0]}}
    plot_recovery([Metric("recovery.seconds", 0.04, "s", detail=detail)], tmp_path / "recovery.png")
    assert (tmp_path / "recovery.png").stat().st_size > 0
    with pytest.raises(DataError, match="times between tokens"):
        plot_recovery([Metric("recovery.equal_texts", 1.0, "ratio")], tmp_path / "none.png")
