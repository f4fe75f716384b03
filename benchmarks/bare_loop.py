"""A training loop with any engine, and neither files nor evaluations: its steps are called one by one."""

from collections.abc import Callable
from typing import cast

from cluster.training.batches import Batch
from cluster.training.checkpoint_writer import CheckpointWriter
from cluster.training.config import TrainConfig
from cluster.training.engine import Engine
from cluster.training.loop import LoopHooks, TrainingLoop
from cluster.training.objective import Objective


def bare_loop(
    engine: Engine,
    config: TrainConfig,
    peak_learning_rate: float,
    train_batch: Callable[[int], Batch],
    is_compiled: bool = False,
) -> TrainingLoop:
    """Return a loop whose ``step(number)`` trains.

    Args:
        engine: holds the model.
        config: whose folders nobody opens.
        peak_learning_rate: of the schedule.
        train_batch: number of a step, from 0 → this worker's inputs and targets.
        is_compiled: whether the engine's blocks are.
    """
    objective = Objective(config.load_balance_weight, config.router_z_weight, is_compiled)
    checkpoints = cast(CheckpointWriter, _NoCheckpoints())
    hooks = LoopHooks(train_batch, lambda: (), lambda line: None, checkpoints, lambda: False)
    return TrainingLoop(engine, objective, config, peak_learning_rate, hooks)


class _NoCheckpoints:
    """Never writes: in place of a CheckpointWriter."""

    is_idle = False

    def signals(self) -> tuple[float, float]:
        return 0.0, 0.0

    def observe(self, num_written: float, num_failed: float) -> None:
        pass

    def discard(self, step: int) -> None:
        pass
