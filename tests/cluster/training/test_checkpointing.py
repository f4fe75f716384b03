import json
import logging
import multiprocessing
import os

import pytest
import torch

from cluster.training.checkpointing import check_resumable, latest_checkpoint, read_checkpoint, write_checkpoint
from cluster.training.optimizer import build_optimizer, optimizer_tensors, set_step_size
from cluster.training.state import TrainingState
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.model import MoETransformer


@pytest.fixture
def run(model_config, config):
    """A model and an optimizer after one step, and a function that writes their checkpoint."""
    torch.manual_seed(0)
    model = MoETransformer(model_config)
    optimizer = build_optimizer(model, 0.9, 0.95)
    set_step_size(optimizer, 1e-3, 0.1)
    model(torch.arange(8).view(1, 8)).logits.square().mean().backward()
    optimizer.step()

    def write(step):
        return write_checkpoint(config.out_folder, model, optimizer, TrainingState(step, step * 64), config, "data")

    return model, optimizer, write


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_everything_comes_back(run, config):
    model, optimizer, write = run
    folder = write(3)
    assert latest_checkpoint(config.out_folder) == folder
    point = read_checkpoint(folder)
    assert point.state == TrainingState(3, 192)
    assert point.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, point.model.state_dict()[name])
    for name, tensor in optimizer_tensors(model, optimizer).items():
        assert torch.equal(tensor, point.optimizer_tensors[name])
    load_model(folder)  # a training checkpoint is a native one, too


def test_the_newest_are_kept(run, config):
    write = run[2]
    for step in (1, 2, 10, 1_000_000):
        folder = write(step)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_000010", "step_1000000"]
    assert latest_checkpoint(config.out_folder) == folder


def test_nothing_yet_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_a_damaged_newest_is_skipped_with_a_warning(run, config, caplog, name):
    write = run[2]
    good, bad = write(1), write(2)
    damage(bad / name)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(config.out_folder) == good
    assert name in caplog.text


def test_only_damaged_ones_are_an_error(run, config):
    damage(run[2](1) / "model.safetensors")
    with pytest.raises(CheckpointError, match="start over"):
        latest_checkpoint(config.out_folder)


def die_while_writing(write):
    original = os.fsync
    count = 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count == 4:
            os._exit(9)
        original(descriptor)

    os.fsync = fsync
    write(2)


def test_a_killed_writer_leaves_the_checkpoint_before(run, config):
    write = run[2]
    good = write(1)
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(write,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(list(good.parent.iterdir())) == 2  # the unfinished one lies there
    assert latest_checkpoint(config.out_folder) == good
    write(3)
    assert sorted(path.name for path in good.parent.iterdir()) == ["step_000001", "step_000003"]


def test_a_full_disk_is_our_error_and_keeps_the_one_before(run, config, monkeypatch):
    write = run[2]
    good = write(1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.training.checkpointing.write_model", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        write(2)
    assert latest_checkpoint(config.out_folder) == good


def test_another_run_is_refused(run, model_config, config):
    folder = run[2](1)
    check_resumable(folder, model_config, config, "data")
    check_resumable(folder, model_config, config.replace(num_workers=2, eval_every_steps=7), "data")
    with pytest.raises(CheckpointError, match="num_experts was 4, now 8"):
        check_resumable(folder, model_config.replace(num_experts=8), config, "data")
    with pytest.raises(CheckpointError, match="other data"):
        check_resumable(folder, model_config, config, "other")
    with pytest.raises(ConfigError, match="num_steps was 6, now 7"):
        check_resumable(folder, model_config, config.replace(num_steps=7), "data")


@pytest.mark.parametrize("change", [{"step": -1}, {"step": "1"}, {"extra": 1}, {"train_s": None}])
def test_an_impossible_state_is_refused(change):
    values = {"step": 1, "num_tokens": 1, "train_s": 0.0, "timed_tokens": 0, "timed_s": 0.0}
    assert TrainingState.from_dict(json.loads(json.dumps(values)), "state.json").step == 1
    with pytest.raises(CheckpointError, match=r"state\.json"):
        TrainingState.from_dict({**values, **change}, "state.json")
