import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.training.deepspeed_engine import DeepSpeedEngine
from cluster.training.engine import TorchEngine
from cluster.training.objective import Objective
from cluster.training.optimizer import set_step_size
from moe_bitnet.model import MoETransformer

BATCH_SIZE, SEQ_LEN = 4, 16


@pytest.fixture(scope="module")
def _process_group():
    """One for the module: DeepSpeed remembers the first one of a process."""
    had_local_rank = "LOCAL_RANK" in os.environ
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    if not had_local_rank:
        os.environ.pop("LOCAL_RANK", None)


def fresh(model_config):
    torch.manual_seed(0)
    return MoETransformer(model_config)


def train_steps(engine, steps, rank=0, world_size=1):
    # without the router's losses the objective is a mean over tokens, which workers can share exactly
    objective = Objective(0.0, 0.0)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(engine.model.config.vocab_size, (BATCH_SIZE, SEQ_LEN + 1), generator=generator)
        tokens = tokens.chunk(world_size)[rank]
        score = objective.score(engine.forward(tokens[:, :-1]), tokens[:, 1:])
        engine.backward(objective.total(score, score.tokens_per_expert))
        set_step_size(engine.optimizer, 1e-2, 0.1)
        engine.step()


def largest_difference(model, parameters):
    return max(float((value - parameters[name]).abs().max()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("_process_group")
def test_deepspeed_equals_torch(model_config, config, compute_dtype):
    # the float twin: a ternary weight on a rounding threshold would turn a last bit into a whole step
    model_config = model_config.replace(precision="float")
    config = config.replace(compute_dtype=compute_dtype)
    expected = TorchEngine(fresh(model_config), config)
    train_steps(expected, range(5))
    engine = DeepSpeedEngine(fresh(model_config), config)
    train_steps(engine, range(5))
    # 5 updates of about 1e-2; bfloat16 gradients near 0 may change the sign of one update
    tolerance = 1e-5 if compute_dtype == "float32" else 2e-3
    assert largest_difference(engine.model, expected.model.state_dict()) < tolerance
    assert next(iter(engine.model.parameters())).dtype == torch.float32


@pytest.mark.usefixtures("_process_group")
def test_deepspeed_resumes_to_the_bit(model_config, config):
    whole = DeepSpeedEngine(fresh(model_config), config)
    train_steps(whole, range(3))
    saved = {fragment.name: fragment.values.clone() for fragment in whole.fragments()}
    train_steps(whole, range(3, 6))
    resumed = DeepSpeedEngine(fresh(model_config), config)
    resumed.load(lambda name, start, count: saved[name][start : start + count], 3)
    train_steps(resumed, range(3, 6))
    assert largest_difference(resumed.model, whole.model.state_dict()) == 0


def two_workers(rank, model_config, config, folder):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    engine = DeepSpeedEngine(fresh(model_config), config)
    train_steps(engine, range(5), rank, 2)
    assert engine.sum_over_workers(torch.tensor([rank + 1.0])).item() == 3
    torch.save(engine.model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_equal_one(model_config, config, tmp_path):
    model_config = model_config.replace(precision="float")
    model = fresh(model_config)
    train_steps(TorchEngine(model, config), range(5))
    mp.spawn(two_workers, (model_config, config, str(tmp_path)), nprocs=2)
    for rank in range(2):
        parameters = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert largest_difference(model, parameters) < 1e-5
