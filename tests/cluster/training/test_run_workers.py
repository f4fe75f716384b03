import json
import multiprocessing
import os
import signal

import pytest
import torch
from worker_threads import run_workers

from cluster.training import checkpoint_folder, fragment_file
from cluster.training.checkpointing import latest_checkpoint
from cluster.training.run import build_torch_engine, run_training
from cluster.training.stopping import request_stop
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.errors import CheckpointError, TrainingError

NUM_STEPS = 6


def losses_of(config):
    lines = [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))  # each once
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)


def weights_of(config):
    return load_model(config.out_folder / "model").state_dict()


def stop_after(config, num_steps):
    """Train until ``num_steps`` are done, then stop as asked."""
    num_forwards = [0]

    def count(engine):
        if engine.rank == 0:
            num_forwards[0] += 1
            if num_forwards[0] == num_steps * config.gradient_accumulation_steps:
                request_stop(config.out_folder)

    return count


@pytest.fixture
def smooth_config(model_config):
    """A model that does not round: a ternary weight may fall to the other side when gradients are added otherwise."""
    return model_config.replace(precision="float")


@pytest.fixture
def undisturbed(model_config, config, tmp_path):
    """The same run in one piece by one worker."""
    whole = config.replace(out_folder=tmp_path / "whole")
    assert run_workers(model_config, whole)[0]["num_steps"] == NUM_STEPS
    return whole


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_workers": 2}, {"num_workers": 2}),
        ({"num_workers": 2}, {}),
        ({}, {"num_workers": 4}),
        ({"num_workers": 4}, {"num_workers": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_a_run_goes_on_with_another_number_of_workers(smooth_config, config, tmp_path, before, after):
    config = config.replace(load_balance_weight=0)  # micro-steps balance their own tokens
    undisturbed = config.replace(out_folder=tmp_path / "whole")
    assert run_workers(smooth_config, undisturbed)[0]["num_steps"] == NUM_STEPS
    config = config.replace(**before)
    assert run_workers(smooth_config, config, stop_after(config, 3)) == [None] * config.num_workers
    folder = latest_checkpoint(config.out_folder)
    assert folder.name == "step_000003"
    assert len(list(folder.glob("shard-*"))) == config.num_workers
    (config.out_folder / "stop-requested").unlink()
    config = config.replace(num_workers=1, gradient_accumulation_steps=1).replace(**after)
    assert run_workers(smooth_config, config)[0]["num_steps"] == NUM_STEPS
    torch.testing.assert_close(losses_of(config), losses_of(undisturbed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stopped_at", range(1, NUM_STEPS))
def test_resuming_two_workers_at_any_step_is_exact_to_the_bit(model_config, config, tmp_path, stopped_at):
    config = config.replace(num_workers=2)
    whole = config.replace(out_folder=tmp_path / "whole")
    run_workers(model_config, whole)
    run_workers(model_config, config, stop_after(config, stopped_at))
    (config.out_folder / "stop-requested").unlink()
    run_workers(model_config, config)
    assert torch.equal(losses_of(config), losses_of(whole))
    found = weights_of(config)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(found[name], tensor), name


def test_checkpoints_on_the_way_do_not_change_the_run(model_config, config, tmp_path):
    config = config.replace(num_workers=2)
    whole = config.replace(out_folder=tmp_path / "whole")
    run_workers(model_config, whole)
    run_workers(model_config, config.replace(checkpoint_every_s=1e-9))
    assert torch.equal(losses_of(config), losses_of(whole))


def test_a_full_disk_stops_all_workers_with_one_error(model_config, config, monkeypatch):
    config = config.replace(num_workers=2, checkpoint_every_s=1e-9)
    write = checkpoint_folder.write_part

    def fail(folder, fragments, rank, world_size):
        write(folder, fragments, rank, world_size)
        if rank == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.training.checkpoint_writer.write_part", fail)
    errors = run_workers(model_config, config)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "worker 1: [Errno 28] No space left on device" in str(errors[0])


def test_parameters_of_one_worker_that_are_not_finite_stop_all(model_config, config):
    config = config.replace(num_workers=2)

    def poison(engine):  # the last element is in the share of worker 1
        if engine.optimizer.state:
            state = engine.optimizer.state[engine.model.norm.weight]
            if state["step"] == NUM_STEPS - 1:
                state["exp_avg_sq"][-1] = torch.inf

    errors = run_workers(model_config, config, poison)
    assert [type(error) for error in errors] == [TrainingError] * 2
    assert "another worker" in str(errors[0])
    assert "norm.weight" in str(errors[1])
    assert latest_checkpoint(config.out_folder) is None


def die_while_writing(model_config, config):
    """Train; be killed when half of the second checkpoint is in its file."""
    write = fragment_file.write_fragments
    num_files = 0

    def write_half(path, fragments):
        nonlocal num_files
        num_files += 1
        if num_files == 2:
            with path.open("wb") as file:
                file.write(b"\0" * 1000)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return write(path, fragments)

    checkpoint_folder.write_fragments = write_half
    torch.set_num_threads(1)
    run_training(model_config, config, build_torch_engine(config), torch.device("cpu"))


def test_a_worker_killed_while_it_writes_leaves_the_checkpoint_before(
    model_config, config, undisturbed, immediate_writes
):
    process = multiprocessing.get_context("fork").Process(
        target=die_while_writing, args=(model_config, config.replace(checkpoint_every_s=1e-9))
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    folder = latest_checkpoint(config.out_folder)
    assert folder.name == "step_000001"
    assert len(list(folder.parent.iterdir())) == 2  # the unfinished one lies there
    assert run_training(model_config, config, build_torch_engine(config), torch.device("cpu"))["num_steps"] == NUM_STEPS
    assert torch.equal(losses_of(config), losses_of(undisturbed))
    assert not list(folder.parent.glob(".step_*"))
    found = weights_of(config)
    for name, tensor in weights_of(undisturbed).items():
        assert torch.equal(found[name], tensor), name
