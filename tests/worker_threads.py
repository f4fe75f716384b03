"""Workers as threads of one process: what they agree on is added up at a barrier, as a process group would."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from cluster.training import run as training_run
from cluster.training.engine import TorchEngine
from cluster.training.fragments import whole_fragments


class ThreadGroup:
    """A group of engines that can only tell each other numbers."""

    def __init__(self, world_size):
        self.world_size = world_size
        self._rows = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=20)

    def run(self, function):
        """Call ``function(engine)`` in a thread of each worker; returns the results or exceptions by rank."""

        def call(rank):
            try:
                return function(ThreadEngine(self, rank))
            except Exception as error:  # noqa: BLE001 - handed to the test
                return error

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(call, range(self.world_size)))

    def add_up(self, rank, values):
        self._rows[rank] = values.clone()
        self._barrier.wait()
        assert len({row.shape for row in self._rows}) == 1, "workers are at different points"
        total = torch.stack(self._rows).sum(dim=0)
        self._barrier.wait()
        return total


class ThreadEngine:
    """The part of an engine that messages need."""

    device = torch.device("cpu")

    def __init__(self, group, rank):
        self.group, self.rank, self.world_size = group, rank, group.world_size

    def sum_over_workers(self, values):
        return self.group.add_up(self.rank, values)


class ThreadTrainer(TorchEngine):
    """A worker that trains its share of each batch: plain data parallelism over the threads of a group."""

    def __init__(self, group, rank, model, config, is_compiled):
        super().__init__(model, config, is_compiled)
        self.group, self.rank, self.world_size = group, rank, group.world_size

    def step(self):
        for parameter in self.model.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.group.add_up(self.rank, gradient) / self.world_size
        return super().step()

    def sum_over_workers(self, values):
        return self.group.add_up(self.rank, values)

    def fragments(self):
        return whole_fragments(self.model, self.optimizer, self.rank, self.world_size)

    def full_model(self):
        return self.model if self.rank == 0 else None


def run_workers(model_config, config, on_forward=lambda engine: None):
    """Run a training of ``config.num_workers`` threads; returns what each of them returned or raised."""

    class Observed(ThreadTrainer):
        def forward(self, token_ids):
            on_forward(self)
            return super().forward(token_ids)

    group = ThreadGroup(config.num_workers)
    lock, initial_model = threading.Lock(), training_run._initial_model

    def draw_alone(*settings):  # the random state is the process's, not the thread's
        with lock:
            return initial_model(*settings)

    def run(worker):
        return training_run.run_training(
            model_config,
            config,
            lambda model, is_compiled: Observed(group, worker.rank, model, config, is_compiled),
            torch.device("cpu"),
            worker.rank,
            group.world_size,
        )

    with mock.patch.object(training_run, "_initial_model", draw_alone):
        return group.run(run)
