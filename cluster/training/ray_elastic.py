"""A Ray trainer whose number of workers follows the hosts that are there.

Ray's own elastic policy takes any number between two bounds. A batch can only be
divided by some of them, and expert parallelism by fewer: here Ray is offered those
alone. This needs three names from the inside of Ray Train 2.60, all of them in this
file: the policy, the method of it that counts, and the trainer's method that takes a policy.
"""

from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from cluster.training.config import TrainConfig


def allowed_worker_counts(config: TrainConfig) -> tuple[int, ...]:
    """Return the numbers of workers that a run may go on with, in rising order; the last is ``num_workers``.

    Each divides the batch in its parts, and is a multiple of ``expert_parallel``.
    """
    smallest = config.num_workers if config.min_workers is None else config.min_workers
    return tuple(
        count
        for count in range(smallest, config.num_workers + 1)
        if config.batch_size % (count * config.gradient_accumulation_steps) == 0 and count % config.expert_parallel == 0
    )


class AllowedCountsPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's elastic policy, rounded down to a number of workers that the run may have.

    Args:
        scaling_config: with both bounds.
        counts: what is allowed, in rising order.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, counts: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._counts = counts

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Return 0 where not even the smallest number fits; Ray then waits for hosts."""
        num_possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= num_possible), default=0)


class ElasticTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """A ``TorchTrainer`` that follows :class:`AllowedCountsPolicy`.

    Args:
        counts: numbers of workers that are allowed, in rising order.
        arguments: of ``TorchTrainer``.
    """

    def __init__(self, *arguments: Any, counts: tuple[int, ...], **named_arguments: Any) -> None:
        super().__init__(*arguments, **named_arguments)
        self._counts = counts

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = AllowedCountsPolicy(self.scaling_config, self._counts)
        return super()._initialize_and_run_controller(**arguments)
