import threading
import time

import pytest
import torch
from worker_threads import ThreadGroup

from cluster.training import checkpoint_writer
from cluster.training.checkpoint_folder import commit, write_part
from cluster.training.checkpoint_writer import CheckpointWriter
from cluster.training.checkpointing import latest_checkpoint, read_model
from cluster.training.fragments import Fragment, share_of
from cluster.training.state import TrainingState
from moe_bitnet.errors import CheckpointError
from moe_bitnet.model import MoETransformer


@pytest.fixture
def model(model_config):
    torch.manual_seed(0)
    return MoETransformer(model_config)


@pytest.fixture
def writer_of(model_config, config):
    return lambda worker: CheckpointWriter(worker, model_config, config, "data")


def fragments_of(model, worker):
    fragments = []
    for name, parameter in model.named_parameters():
        start, count = share_of(parameter.numel(), worker.rank, worker.world_size)
        values = parameter.detach().flatten()[start : start + count]
        fragments.append(Fragment(name, tuple(parameter.shape), start, values))
    return fragments


def step(worker, writer):
    """What the training loop does in each step."""
    writer.observe(*worker.sum_over_workers(torch.tensor(writer.signals(), dtype=torch.float64)).tolist())


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_training_goes_on_while_a_checkpoint_is_written(model, config, writer_of, monkeypatch):
    """It gets its name only when the slowest worker is done, and holds what was there when it began."""
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    is_released, all_have_begun = threading.Event(), threading.Barrier(3, timeout=20)

    def slow(folder, fragments, rank, world_size):
        if rank == 2:
            assert is_released.wait(20)
        write_part(folder, fragments, rank, world_size)

    monkeypatch.setattr(checkpoint_writer, "write_part", slow)

    def run(worker):
        writer = writer_of(worker)
        writer.begin(TrainingState(7), fragments_of(model, worker))
        all_have_begun.wait()
        if worker.rank == 0:
            with torch.no_grad():
                model.norm.weight.add_(1)  # the next step changes parameters in place
        for _ in range(5):
            step(worker, writer)
            assert not writer.is_idle
        assert latest_checkpoint(config.out_folder) is None
        is_released.set()
        writer.finish()
        assert writer.is_idle

    assert ThreadGroup(3).run(run) == [None] * 3
    found = read_model(latest_checkpoint(config.out_folder)).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name])


def test_steps_alone_complete_a_checkpoint(model, config, writer_of):
    def run(worker):
        writer = writer_of(worker)
        writer.begin(TrainingState(7), fragments_of(model, worker))
        for _ in range(2000):
            step(worker, writer)
            # as in the loop, worker 0 says when all go on
            if worker.sum_over_workers(torch.tensor([float(worker.rank == 0 and writer.is_idle)])).item():
                return writer.is_idle
            time.sleep(0.005)
        return "never"

    assert ThreadGroup(2).run(run) == [True, True]
    assert latest_checkpoint(config.out_folder).name == "step_000007"


@pytest.mark.parametrize("has_steps", [True, False])
def test_a_full_disk_of_one_worker_is_the_same_error_on_all(model, config, writer_of, monkeypatch, has_steps):
    def fail(folder, fragments, rank, world_size):
        write_part(folder, fragments, rank, world_size)
        if rank == 1 and ".step_000002." in folder.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_part", fail)

    def run(worker):
        writer = writer_of(worker)
        for number in (1, 2):
            writer.begin(TrainingState(number), fragments_of(model, worker))
            if has_steps and number == 2:
                for _ in range(2000):
                    step(worker, writer)
                    time.sleep(0.005)
            writer.finish()

    errors = ThreadGroup(3).run(run)
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], CheckpointError)
    assert "worker 1: [Errno 28] No space left on device" in str(errors[0])
    folder = latest_checkpoint(config.out_folder)
    assert [path.name for path in folder.parent.glob("step_*")] == ["step_000001"]


def test_a_failure_to_complete_is_the_same_error_on_all(model, config, writer_of, monkeypatch):
    def fail(*parts):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint_writer, "commit", fail)

    def run(worker):
        writer = writer_of(worker)
        writer.begin(TrainingState(1), fragments_of(model, worker))
        writer.finish()

    for error in ThreadGroup(2).run(run):
        assert isinstance(error, CheckpointError)
        assert "worker 0: [Errno 30] Read-only file system" in str(error)
    assert latest_checkpoint(config.out_folder) is None


def test_workers_that_see_different_folders_are_told(model, model_config, config, tmp_path):
    def run(worker):
        own = config.replace(out_folder=tmp_path / str(worker.rank))
        writer = CheckpointWriter(worker, model_config, own, "data")
        writer.begin(TrainingState(1), fragments_of(model, worker))
        writer.finish()

    for error in ThreadGroup(2).run(run):
        assert isinstance(error, CheckpointError)
        assert "file system that all hosts share" in str(error)


def test_a_discarded_checkpoint_never_appears(model, config, writer_of):
    def run(worker):
        writer = writer_of(worker)
        for number in (1, 2):
            writer.begin(TrainingState(number), fragments_of(model, worker))
            if number == 2:
                writer.discard(2)
            writer.finish()

    assert ThreadGroup(2).run(run) == [None] * 2
    folder = latest_checkpoint(config.out_folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step_000001"]


def test_a_written_checkpoint_can_be_discarded(model, config, writer_of):
    def run(worker):
        writer = writer_of(worker)
        for number in (1, 2):
            writer.begin(TrainingState(number), fragments_of(model, worker))
            writer.finish()
        writer.discard(2)

    assert ThreadGroup(2).run(run) == [None] * 2
    assert latest_checkpoint(config.out_folder).name == "step_000001"


def test_leftovers_of_killed_workers_are_deleted(model, config, writer_of):
    leftover = config.out_folder / "checkpoints" / ".step_000009.123"
    leftover.mkdir(parents=True)
    (leftover / "shard-00000-of-00002.safetensors").write_bytes(b"half")
    assert latest_checkpoint(config.out_folder) is None
    ThreadGroup(2).run(writer_of)
    assert not leftover.exists()


def test_what_killed_writers_left_is_deleted_before_others_begin(config, writer_of, monkeypatch):
    """A worker that is ahead of worker 0 must not lose what it writes."""
    deletions = []
    monkeypatch.setattr(checkpoint_writer, "delete_unfinished", lambda folder: deletions.append(time.sleep(0.2)))

    def run(worker):
        writer_of(worker)
        return len(deletions)

    assert ThreadGroup(2).run(run) == [1, 1]


def test_a_part_that_is_lost_before_the_folder_is_named_is_an_error(model_config, tmp_path):
    unfinished = tmp_path / ".step_000001.1"
    for rank in range(2):
        write_part(unfinished, [], rank, 2)
    (unfinished / "shard-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="worker 1 wrote its part"):
        commit(unfinished, tmp_path / "step_000001", 2, model_config, {})
    assert not (tmp_path / "step_000001").exists()
