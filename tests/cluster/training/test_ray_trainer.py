import json
import math
import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from cluster.config import ClusterConfig
from cluster.training.checkpointing import latest_checkpoint
from cluster.training.ray_trainer import _wait_for, train
from cluster.training.stopping import is_stop_requested, request_stop
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.errors import CheckpointError, ClusterError, ConfigError, TrainingError


def test_what_can_be_checked_is_checked_before_ray_starts(model_config, config):
    with pytest.raises(ConfigError, match="vocab_size"):
        train(model_config.replace(vocab_size=999), config)
    assert not ray.is_initialized()


def test_an_address_without_ray_is_one_clear_sentence(model_config, config):
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9"):
        train(model_config, config, ClusterConfig(address="127.0.0.1:9", connect_timeout_s=2))
    assert time.monotonic() - start < 5


class FakeTrainer:
    """Returns or raises what ``TorchTrainer.fit`` would."""

    def __init__(self, result):
        self.result = result

    def fit(self):
        if isinstance(self.result, Exception):
            raise self.result
        return SimpleNamespace(return_value=self.result)


def test_an_error_of_ours_comes_out_as_it_was_raised(tmp_path):
    error = CheckpointError("no space left")
    in_worker = UserExceptionWithTraceback(error, "a long traceback")
    collateral = UserExceptionWithTraceback(RuntimeError("connection closed by peer"), "another one")
    for result in ({"error": error}, WorkerGroupError("failed", {0: collateral, 1: in_worker})):
        with pytest.raises(CheckpointError) as caught:
            _wait_for(FakeTrainer(result), tmp_path)
        assert caught.value is error


def test_a_worker_that_died_twice_is_a_cluster_error(tmp_path):
    result = WorkerGroupError("failed", {0: ray.exceptions.RayActorError()})
    with pytest.raises(ClusterError, match="resumes from the last checkpoint"):
        _wait_for(FakeTrainer(result), tmp_path)


def test_ctrl_c_waits_for_the_checkpoint(tmp_path):
    class StoppableTrainer:
        is_stopped = False

        def fit(self):
            os.kill(os.getpid(), signal.SIGINT)
            while not is_stop_requested(tmp_path):
                time.sleep(0.01)
            time.sleep(0.3)  # the worker finishes its step
            self.is_stopped = True
            return SimpleNamespace(return_value={"summary": None})

    trainer = StoppableTrainer()
    with pytest.raises(KeyboardInterrupt):
        _wait_for(trainer, tmp_path)
    assert trainer.is_stopped


def test_a_bug_stays_a_bug(tmp_path):
    with pytest.raises(WorkerGroupError, match="traceback of the worker"):
        _wait_for(
            FakeTrainer(WorkerGroupError("traceback of the worker", {0: RuntimeError("a bug")})),
            tmp_path,
        )


@pytest.fixture
def _local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("_local_ray")
def test_train_stops_and_resumes(model_config, config):
    config = config.replace(threads_per_worker=1, num_steps=200, eval_every_steps=100)
    told = []

    def stop_after_three(line):
        told.append(line)
        if line["step"] == 3:
            request_stop(config.out_folder)

    with pytest.raises(TrainingError, match="asked to stop"):
        train(model_config, config, on_progress=stop_after_three)
    stopped_at = told[-1]["step"]
    assert 3 <= stopped_at < 200
    assert latest_checkpoint(config.out_folder).name == f"step_{stopped_at:06d}"

    told.clear()
    summary = train(model_config, config, on_progress=told.append)
    assert told[0]["step"] == stopped_at + 1
    assert told[-1]["validation_loss"] == summary["validation_loss"]
    assert summary == json.loads((config.out_folder / "summary.json").read_text())
    assert summary["num_tokens"] == 200 * config.tokens_per_step
    assert summary["validation_loss"] < math.log(model_config.vocab_size) / 1.5
    assert load_model(config.out_folder / "model").config == model_config
    assert not (config.out_folder / "ray").exists()
    assert "resuming after step" in (config.out_folder / "train.log").read_text()
    assert ray.is_initialized()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("_local_ray")
def test_a_killed_worker_is_restarted_and_an_error_comes_home(model_config, config):
    config = config.replace(threads_per_worker=1, num_steps=200, checkpoint_every_s=1e-3)
    killed = []

    def kill_at_twenty(line):
        if line["step"] == 20 and not killed:
            killed.append(worker_of_this_ray())
            os.kill(killed[0], signal.SIGKILL)

    summary = train(model_config, config, on_progress=kill_at_twenty)
    assert killed
    assert summary["num_steps"] == 200
    steps = [json.loads(line)["step"] for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 201))
    assert "resuming after step" in (config.out_folder / "train.log").read_text()
    with pytest.raises(CheckpointError, match="another model"):
        train(model_config.replace(num_experts=8), config)


def worker_of_this_ray():
    """Return the process id of the training worker among the processes that this one started."""
    workers = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 1, workers
    return workers[0]
