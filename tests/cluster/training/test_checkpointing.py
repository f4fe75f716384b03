import json
import logging

import pytest
import torch
from worker_threads import ThreadGroup

from cluster.training.checkpoint_folder import best_checkpoint
from cluster.training.checkpoint_writer import CheckpointWriter
from cluster.training.checkpointing import check_resumable, latest_checkpoint, read_checkpoint, read_model
from cluster.training.engine import TorchEngine
from cluster.training.fragments import MOMENTS, adam_state, whole_fragments
from cluster.training.optimizer import set_step_size
from cluster.training.state import TrainingState
from moe_bitnet.checkpoint.manifest import write_manifest
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.model import MoETransformer


@pytest.fixture
def engine(model_config, config):
    """An engine after one step."""
    return engine_after_a_step(model_config, config)


@pytest.fixture
def write(engine, model_config, config):
    """A function that writes the checkpoint of a step, as that many workers."""

    def write(step, world_size=2, validation_loss=None):
        state = TrainingState(step, step * 64, validation_loss=validation_loss)

        def run(worker):
            writer = CheckpointWriter(worker, model_config, config, "data")
            writer.begin(state, whole_fragments(engine.model, engine.optimizer, worker.rank, world_size))
            writer.finish()

        assert ThreadGroup(world_size).run(run) == [None] * world_size
        return config.out_folder / "checkpoints" / f"step_{step:06d}"

    return write


def engine_after_a_step(model_config, config, seed=0):
    torch.manual_seed(seed)
    engine = TorchEngine(MoETransformer(model_config), config)
    set_step_size(engine.optimizer, 1e-3, 0.1)
    engine.backward(engine.forward(torch.arange(8).view(1, 8)).logits.square().mean())
    engine.step()
    return engine


def tensors_of(engine):
    return {fragment.name: fragment.values.clone() for fragment in engine.fragments()}


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_everything_comes_back_whatever_the_number_of_writers(write, engine, model_config, config, world_size):
    folder = write(3, world_size)
    assert latest_checkpoint(config.out_folder) == folder
    assert len(list(folder.glob(f"shard-*-of-{world_size:05d}.safetensors"))) == world_size
    point = read_checkpoint(folder)
    assert point.state == TrainingState(3, 192)
    other = TorchEngine(MoETransformer(model_config), config)
    other.load(point.read, 3)
    expected, found = tensors_of(engine), tensors_of(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for parameter in other.model.parameters():
        assert adam_state(other.optimizer, parameter)["step"] == 3


def test_frozen_parameters_need_no_optimizer_state(model_config, config):
    config = config.replace(has_frozen_backbone=True)
    engine = engine_after_a_step(model_config, config)

    def run(worker):
        writer = CheckpointWriter(worker, model_config, config, "data")
        writer.begin(TrainingState(1), whole_fragments(engine.model, engine.optimizer))
        writer.finish()

    assert ThreadGroup(1).run(run) == [None]
    other = engine_after_a_step(model_config, config, seed=1)
    other.load(read_checkpoint(latest_checkpoint(config.out_folder)).read, 1)
    found = tensors_of(other)
    assert not {f"embedding.weight.{moment}" for moment in MOMENTS} & found.keys()
    for name, tensor in tensors_of(engine).items():
        assert torch.equal(tensor, found[name]), name


def test_the_whole_model_is_read(write, engine):
    folder = write(3, 2)
    model = read_model(folder)
    assert model.training
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    damage(folder / "shard-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="altered"):
        read_model(folder)


def test_loading_it_as_a_model_says_what_to_do(write):
    with pytest.raises(CheckpointError, match="moe-bitnet export"):
        load_model(write(1))


def test_the_newest_and_the_best_are_kept(write, config):
    for step, loss in [(1, 5.0), (2, 3.0), (10, 3.0), (20, 4.0), (30, None), (1_000_000, 3.5)]:
        folder = write(step, 1, loss)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_000002", "step_000030", "step_1000000"]
    assert best_checkpoint(config.out_folder).name == "step_000002"
    assert latest_checkpoint(config.out_folder) == folder
    write(1_000_001, 1, 2.5)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_1000000", "step_1000001"]


def test_nothing_yet_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "name",
    ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "state.json", "config.json"],
)
def test_a_damaged_newest_is_skipped_with_a_warning_and_replaced(write, config, caplog, name):
    good, bad = write(1), write(2)
    damage(bad / name)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(config.out_folder) == good
    assert name in caplog.text
    assert write(2) == latest_checkpoint(config.out_folder)


def test_only_damaged_ones_are_an_error(write, config):
    damage(write(1) / "shard-00000-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="start over"):
        latest_checkpoint(config.out_folder)


def test_parts_that_do_not_fit_the_model_are_refused(write, model_config):
    folder = write(1)
    (folder / "shard-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="each of its"):
        read_checkpoint(folder)
    folder = write(2)
    header = json.loads((folder / "config.json").read_text())
    header["model"]["num_experts"] = 10**6  # refused by the files' headers, before anything is allocated
    (folder / "config.json").write_text(json.dumps(header))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="the model needs"):
        read_checkpoint(folder)


def test_another_run_is_refused(write, model_config, config):
    folder = write(1)
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
    values = {
        "step": 1,
        "num_tokens": 1,
        "train_s": 0.0,
        "timed_tokens": 0,
        "timed_s": 0.0,
        "validation_loss": None,
    }
    assert TrainingState.from_dict(json.loads(json.dumps(values)), "state.json").step == 1
    assert TrainingState.from_dict({**values, "validation_loss": 2.5}, "state.json").validation_loss == 2.5
    with pytest.raises(CheckpointError, match=r"state\.json"):
        TrainingState.from_dict({**values, **change}, "state.json")
