import time

from cluster.training.metrics import METRICS_NAME, MetricsLog
from cluster.training.progress import MetricsFollower


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_new_lines_are_told_once_each(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.append({"step": 1, "loss": 3.0})
    told = []
    with MetricsFollower(tmp_path / METRICS_NAME, told.append):
        with MetricsLog(tmp_path, 1) as log:
            log.append({"step": 2, "loss": 2.0})
            log.append({"step": 3, "loss": 1.0})
            wait_until(lambda: len(told) == 2)
        with MetricsLog(tmp_path, 2) as log:  # a worker was restarted from step 2
            log.append({"step": 3, "loss": 0.5})
    assert told == [{"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 3, "loss": 0.5}]


def test_the_last_lines_are_told_before_the_block_ends(tmp_path):
    told = []
    with MetricsFollower(tmp_path / METRICS_NAME, told.append), MetricsLog(tmp_path, 0) as log:
        log.append({"step": 1})
    assert told == [{"step": 1}]


def test_a_line_that_is_being_written_waits(tmp_path):
    path, told = tmp_path / METRICS_NAME, []
    path.write_text('{"step": 1}\n{"st')
    with MetricsFollower(tmp_path / "other", told.append) as follower:
        follower._path = path
    assert told == [{"step": 1}]


def test_a_failing_callback_does_not_disturb(tmp_path, caplog):
    def fail(line):
        raise ValueError("the progress bar broke")

    with MetricsFollower(tmp_path / METRICS_NAME, fail), MetricsLog(tmp_path, 0) as log:
        log.append({"step": 1})
        log.append({"step": 2})
    assert caplog.text.count("on_progress failed") == 1
