"""What training minimizes: cross entropy plus two small losses of the routers.

``total = loss + load_balance_weight · load_balance_loss + router_z_weight · router_z_loss``, all in float32.

Each term is a mean over the batch: the mean of all workers' totals, and of its gradients, is that of the whole batch.
For the load balance that takes the visits of the whole batch, so that it comes in two steps: workers score their
part, add up their visits, and then take the total.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bitnet.model import ModelOutput
from moe_bitnet.router import load_balance_loss


@dataclass(frozen=True)
class Score:
    """One worker's part of the objective.

    Attributes:
        loss: cross entropy, nats a token; float32 scalar.
        router_z_loss: unweighted; float32 scalar.
        router_probabilities: float32 ``[num_layers, E]``, means over the worker's tokens.
        tokens_per_expert: int64 ``[num_layers, E]``, visits of the worker's tokens.
    """

    loss: Tensor
    router_z_loss: Tensor
    router_probabilities: Tensor
    tokens_per_expert: Tensor


class Objective:
    """Score a model's output against the next tokens.

    Args:
        load_balance_weight: of the load-balance loss.
        router_z_weight: of the z-loss.
        is_compiled: compile the cross entropy, which fuses its passes over the ``[T, V]`` logits:
            a fifth of a whole step of a small model on a CPU.
    """

    def __init__(self, load_balance_weight: float, router_z_weight: float, is_compiled: bool = False) -> None:
        self.load_balance_weight = load_balance_weight
        self.router_z_weight = router_z_weight
        self._cross_entropy: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(cross_entropy) if is_compiled else cross_entropy
        )

    def score(self, output: ModelOutput, targets: Tensor) -> Score:
        """Score one worker's output.

        Args:
            output: of the model for B sequences of S tokens.
            targets: int64 ``[B, S]``, the token after each position.
        """
        loss = self._cross_entropy(output.logits, targets)
        return Score(loss, output.router_z_loss, output.router_probabilities, output.tokens_per_expert)

    def total(self, score: Score, tokens_per_expert: Tensor) -> Tensor:
        """Return what this worker takes gradients of; a float32 scalar.

        Args:
            score: of this worker.
            tokens_per_expert: ``[num_layers, E]``, visits of all workers.
        """
        balance = load_balance_loss(score.router_probabilities, tokens_per_expert)
        return score.loss + self.load_balance_weight * balance + self.router_z_weight * score.router_z_loss


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats of ``targets`` ``[B, S]`` under ``logits`` ``[B, S, V]``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
