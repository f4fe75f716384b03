import json

import psutil
import pytest
import ray

from cluster.training import ray_worker
from cluster.training.attempts import num_restarts, read_attempts
from cluster.training.ray_trainer import train
from moe_bitnet.errors import CheckpointError, ClusterError, TrainingError

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # two workers that import DeepSpeed, and each restart imports it again


@pytest.fixture(scope="module")
def _two_cpus():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def config(config):
    return config.replace(num_workers=2, threads_per_worker=1, num_steps=60, eval_every_steps=30)


def losses_of(config):
    lines = [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "every step once, in order"
    return [line["loss"] for line in lines if "loss" in line]


def training_workers(parent=None):
    """The training workers among the processes that this one started, or that run below ``parent``."""
    processes = (parent or psutil.Process()).children(recursive=True)
    return [each for each in processes if "RayTrainWorker" in " ".join(each.cmdline())]


def at_step(number, act):
    """Return an ``on_progress`` that acts once, when a step was done."""
    done = []

    def on_progress(line):
        if line["step"] >= number and not done:
            done.append(number)
            act()

    return on_progress


@pytest.mark.parametrize("sharing", [{}, {"expert_parallel": 2, "zero_stage": 1}], ids=["data", "experts"])
@pytest.mark.usefixtures("_two_cpus")
def test_a_killed_worker_changes_nothing(model_config, config, tmp_path, sharing):
    config = config.replace(**sharing)
    train(model_config, config)
    disturbed = config.replace(out_folder=tmp_path / "disturbed", checkpoint_every_s=0.05)
    summary = train(model_config, disturbed, on_progress=at_step(20, lambda: training_workers()[1].kill()))
    assert losses_of(disturbed) == losses_of(config)
    assert summary["num_steps"] == 60
    assert num_restarts(read_attempts(disturbed.out_folder)) == 1
    assert "resuming after step" in (disturbed.out_folder / ray_worker.LOG_NAME).read_text()


@pytest.mark.usefixtures("_two_cpus")
def test_restarts_are_bounded(model_config, config):
    config = config.replace(max_restarts=1, num_steps=10_000, checkpoint_every_s=1e3)

    def kill(line):
        if line["step"] == 3:  # without a checkpoint each attempt comes here again
            training_workers()[0].kill()

    with pytest.raises(ClusterError, match="after 1 restarts"):
        train(model_config, config, on_progress=kill)
    assert num_restarts(read_attempts(config.out_folder)) == 1


@pytest.mark.usefixtures("_two_cpus")
def test_an_error_of_ours_on_two_workers_starts_nothing_again(model_config, config):
    config = config.replace(max_loss_rise=1e-6, num_steps=200, checkpoint_every_s=1e-3)
    with pytest.raises(TrainingError, match=r"step \d+: the loss rose"):
        train(model_config, config)
    assert len(read_attempts(config.out_folder)) == 1
    assert not training_workers()
    with pytest.raises(CheckpointError, match="another model"):
        train(model_config.replace(num_experts=8), config)
    assert len(read_attempts(config.out_folder)) == 2
