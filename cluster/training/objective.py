"""What training minimizes: cross entropy plus two small losses of the routers.

``total = loss + load_balance_weight · load_balance_loss + router_z_weight · router_z_loss``, all in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bitnet.model import ModelOutput


@dataclass(frozen=True)
class LossTerms:
    """The parts of the objective, each a float32 scalar.

    Attributes:
        total: what gradients are taken of.
        loss: cross entropy, nats a token.
        load_balance_loss: unweighted; 1 for uniform routers.
        router_z_loss: unweighted.
    """

    total: Tensor
    loss: Tensor
    load_balance_loss: Tensor
    router_z_loss: Tensor


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

    def __call__(self, output: ModelOutput, targets: Tensor) -> LossTerms:
        """Return the loss and its parts.

        Args:
            output: of the model for B sequences of S tokens.
            targets: int64 ``[B, S]``, the token after each position.
        """
        loss = self._cross_entropy(output.logits, targets)
        total = loss + self.load_balance_weight * output.load_balance_loss + self.router_z_weight * output.router_z_loss
        return LossTerms(total, loss, output.load_balance_loss, output.router_z_loss)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats of ``targets`` ``[B, S]`` under ``logits`` ``[B, S, V]``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
