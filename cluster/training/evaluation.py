"""Loss and expert load over the first windows of the validation set."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from cluster.training.batches import Batch
from cluster.training.engine import Engine
from cluster.training.objective import Objective

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: cross entropy, nats a token, without the router losses.
        expert_load: ``[num_layers][num_experts]``, each expert's share of its layer's visits.
    """

    loss: float
    expert_load: tuple[tuple[float, ...], ...]

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return the loss in bits a byte of text, which tokenizers do not change."""
        return self.loss / math.log(2) / bytes_per_token


def evaluate(engine: Engine, objective: Objective, batches: Iterable[Batch]) -> Evaluation:
    """Score validation batches with the numerics of training (the same autocast dtype).

    Args:
        engine: every worker of it must call this; worker r takes batches r, r + world_size, ... Workers without a
            batch in the last round score one all the same: the others may need their experts or parameters.
        objective: whose cross entropy is used.
        batches: the same on all workers, at least one.
    """
    config = engine.model.config
    visits = torch.zeros(config.num_layers, config.num_experts, dtype=torch.float64, device=engine.device)
    loss_sum = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, tokens
    for inputs, targets, is_ours in _share(batches, engine.rank, engine.world_size):
        output = engine.predict(torch.from_numpy(inputs).to(engine.device))
        if not is_ours:
            continue
        loss = objective.score(output, torch.from_numpy(targets).to(engine.device)).loss.detach().double()
        loss_sum += torch.stack((loss * inputs.size, loss.new_tensor(inputs.size)))
        visits += output.tokens_per_expert
    loss_sum, visits = engine.sum_over_workers(loss_sum).cpu(), engine.sum_over_workers(visits).cpu()
    assert loss_sum[1] > 0, "evaluate: no validation batches"
    load = visits / visits.sum(dim=1, keepdim=True)
    return Evaluation(float(loss_sum[0] / loss_sum[1]), tuple(tuple(layer) for layer in load.tolist()))


def _share(batches: Iterable[Batch], rank: int, world_size: int) -> Iterator[tuple[TokenIds, TokenIds, bool]]:
    """Yield one worker's batches, and whether each is its own to count; as many on every worker."""
    iterator = iter(batches)
    while taken := list(islice(iterator, world_size)):
        is_ours = rank < len(taken)
        inputs, targets = taken[rank if is_ours else 0]
        yield inputs, targets, is_ours
