import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import ray
from ray.train import WorkerGroupError

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


def test_what_went_wrong_comes_out_as_an_error_of_ours(config):
    error = CheckpointError("no space left")
    with pytest.raises(CheckpointError) as caught:
        _wait_for(FakeTrainer(WorkerGroupError("failed", {0: RuntimeError("collateral"), 1: error})), config)
    assert caught.value is error


@pytest.fixture
def _interruptible():
    """Take SIGINT as Python does, also where the tests are a shell's background job, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_waits_for_the_checkpoint(config):
    class StoppableTrainer:
        is_stopped = False

        def fit(self):
            os.kill(os.getpid(), signal.SIGINT)
            while not is_stop_requested(config.out_folder):
                time.sleep(0.01)
            time.sleep(0.3)  # the worker finishes its step
            self.is_stopped = True
            return SimpleNamespace(return_value=None)

    trainer = StoppableTrainer()
    with pytest.raises(KeyboardInterrupt):
        _wait_for(trainer, config)
    assert trainer.is_stopped


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
    settings = json.loads((config.out_folder / "settings.json").read_text())
    assert settings["model"] == model_config.to_dict()
    with pytest.raises(CheckpointError, match="another model"):
        train(model_config.replace(num_experts=8), config)
    assert json.loads((config.out_folder / "settings.json").read_text()) == settings
    assert ray.is_initialized()
