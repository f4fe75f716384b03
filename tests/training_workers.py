"""Training workers as processes that talk over gloo on this machine, as torchrun would start them."""

import dataclasses
import os
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.training.objective import Objective
from cluster.training.optimizer import set_step_size
from cluster.training.schedule import learning_rate_at
from moe_bitnet.model import MoETransformer


def run_workers(work, world_size, folder, *arguments):
    """Call ``work(rank, world_size, folder, *arguments)`` in as many processes, joined in one group.

    What worker ``r`` returns (for :func:`torch.save`, of tensors and plain values) comes back in place ``r``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_worker, (work, world_size, folder, arguments), nprocs=world_size)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world_size)]


def _worker(rank, work, world_size, folder, arguments):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of what DeepSpeed calls
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size
    )
    try:
        torch.save(work(rank, world_size, folder, *arguments), folder / f"result-{rank}.pt")
    except BaseException:
        traceback.print_exc()  # the first to fail says why; the others fail for the lost connection
        raise
    dist.destroy_process_group()


def fresh_model(model_config):
    """Make a model with the same weights in every process."""
    torch.manual_seed(0)
    return MoETransformer(model_config)


def train_steps(engine, steps, config, rank=0, world_size=1):
    """Train on batches that depend on the step alone, in the warm-up of a longer run; returns the gradients' norms."""
    peak = config.peak_for(engine.model.config.precision)
    objective, norms = Objective(config.load_balance_weight, config.router_z_weight), []
    num_parts, vocab_size = config.gradient_accumulation_steps, engine.model.config.vocab_size
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(vocab_size, (config.batch_size, config.seq_len + 1), generator=generator)
        for part in (whole.chunk(world_size)[rank] for whole in tokens.chunk(num_parts)):
            score = objective.score(engine.forward(part[:, :-1]), part[:, 1:])
            visits = engine.sum_over_workers(score.tokens_per_expert.double())
            engine.backward(objective.total(score, visits))
        set_step_size(engine.optimizer, learning_rate_at(step, 4000, 375, peak), 0.1)
        norms.append(engine.step())
    return norms


def parameters_of(model):
    """Return a copy of a model's parameters by name; empty for ``None``."""
    return {} if model is None else {name: value.detach().clone() for name, value in model.named_parameters()}


def largest_difference(found, expected):
    """Return the largest absolute difference over parameters of the same names."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def fragments_of(engine):
    """Return an engine's fragments as plain values."""
    return [{**vars(each), "values": each.values.clone()} for each in engine.fragments()]


def reader_of(fragments):
    """Join fragments of all workers; fails where two keep the same element, or none does."""
    tensors = {}
    for each in fragments:
        tensor = tensors.setdefault(each["name"], torch.full(tuple(each["shape"]), torch.nan).flatten())
        part = tensor[each["start"] : each["start"] + len(each["values"])]
        assert bool(part.isnan().all()), f"{each['name']} is kept twice"
        part.copy_(each["values"])
    for name, tensor in tensors.items():
        assert not bool(tensor.isnan().any()), f"nobody keeps all of {name}"
    return tensors, lambda name, start, count: tensors[name][start : start + count]


def with_values(config, values):
    """Return a config with other values, given as a plain dictionary."""
    return dataclasses.replace(config, **values)
