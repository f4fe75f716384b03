"""Which worker of a group holds which experts: contiguous runs, as even as they can be.

::

    5 experts, 2 workers:   worker 0: 0 1   worker 1: 2 3 4
"""

from dataclasses import dataclass
from itertools import pairwise

from cluster.training.config import TrainConfig
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError


@dataclass(frozen=True)
class ExpertDivision:
    """Experts of every layer, divided among the workers of an expert-parallel group.

    Attributes:
        num_experts: E, of a layer.
        num_workers: D, of the group; at most E.
    """

    num_experts: int
    num_workers: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_workers <= self.num_experts

    @property
    def starts(self) -> tuple[int, ...]:
        """First expert of each worker, and E at the end; ``[D + 1]``."""
        return tuple(self.num_experts * worker // self.num_workers for worker in range(self.num_workers + 1))

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of each worker, ``[D]``; at least 1."""
        starts = self.starts
        return tuple(end - start for start, end in pairwise(starts))

    @property
    def owners(self) -> tuple[int, ...]:
        """Worker that holds each expert, ``[E]``."""
        return tuple(worker for worker, count in enumerate(self.counts) for _ in range(count))


def check_expert_parallel(model_config: ModelConfig, config: TrainConfig) -> None:
    """Check that every worker of a group gets an expert.

    Raises:
        ConfigError: there are more workers than experts.
    """
    if config.expert_parallel > model_config.num_experts:
        raise ConfigError(
            f"expert_parallel {config.expert_parallel} leaves workers without an expert: the model's num_experts is "
            f"{model_config.num_experts}. Give at most {model_config.num_experts}."
        )
