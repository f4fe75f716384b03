"""Notice a run that diverges: a loss that jumps, or that is not a number any more.

A spike is judged by the median of the last losses, which one bad batch does not
move. All workers see the same mean losses, so that all of them stop in the same step.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
from torch import nn

from moe_bitnet.errors import TrainingError

NUM_WATCHED_LOSSES = 50


class LossWatch:
    """Remembers the last losses, and stops a run whose loss leaves them behind.

    Args:
        max_rise: nats above the median of the last losses at which a run has diverged; ``None`` never.
        recent: losses of the steps before, oldest first: those of a run that is resumed.
    """

    def __init__(self, max_rise: float | None, recent: Iterable[float] = ()) -> None:
        self._max_rise = max_rise
        self._losses = deque(recent, maxlen=NUM_WATCHED_LOSSES)
        self._rise = 0.0

    @property
    def is_calm(self) -> bool:
        """Whether the last loss is no sign of a spike, so that a checkpoint of this moment is worth keeping."""
        return self._max_rise is None or self._rise <= self._max_rise / 2

    def check(self, step: int, loss: float, gradient_norm: float | None = None) -> None:
        """Take the loss of a step.

        Args:
            step: counted from 1.
            loss: mean cross entropy over all workers, nats a token.
            gradient_norm: of the last update, if it is known.
        Raises:
            TrainingError: it is ``max_rise`` above the median of those before.
        """
        median = statistics.median(self._losses) if self._losses else loss
        self._rise = loss - median
        if self._max_rise is not None and self._rise > self._max_rise:
            norm = "" if gradient_norm is None else f"; the norm of the last gradient was {gradient_norm:.3g}"
            raise TrainingError(
                f"step {step}: the loss rose to {loss:.3f}, {self._rise:.2f} nats above {median:.3f}, the median of "
                f"the last {len(self._losses)} steps (max_loss_rise is {self._max_rise:g}){norm}. The last checkpoint "
                f"is from before. Train in another out_folder with a lower peak_learning_rate or a longer warm-up, or "
                f"go on here with a larger max_loss_rise."
            )
        self._losses.append(loss)


def check_finite(step: int, losses: tuple[float, float, float], model: nn.Module) -> None:
    """Check the losses of a step: cross entropy, load balance and z.

    Raises:
        TrainingError: one is not finite; the message names the first tensor that is not, if there is one.
    """
    if all(math.isfinite(loss) for loss in losses):
        return
    name = first_non_finite(model)
    cause = (
        f"{name} is not finite, since the update before"
        if name is not None
        else "all parameters are finite, so that a sum overflowed in the forward pass"
    )
    raise TrainingError(
        f"step {step}: the loss is not finite (loss {losses[0]}, load balance {losses[1]}, z {losses[2]}): {cause}. "
        f"The last checkpoint is kept. Train in another out_folder with a lower peak_learning_rate or a longer warm-up."
    )


def check_finite_parameters(step: int, model: nn.Module) -> None:
    """Check a model after a backward pass whose gradient norm is not finite: the message names where it began.

    Raises:
        TrainingError: a parameter or gradient is not finite; the message names the first one.
    """
    name = first_non_finite(model)
    if name is not None:
        raise TrainingError(
            f"step {step}: {name} is not finite. The last checkpoint is kept. Train in another out_folder with a "
            f"lower peak_learning_rate or a longer warm-up."
        )


def first_non_finite(model: nn.Module) -> str | None:
    """Name the first parameter, in the order of the model, that holds NaN or infinity, or whose gradient does."""
    for name, parameter in model.named_parameters():
        for kind, tensor in (("parameter", parameter), ("gradient of", parameter.grad)):
            # parameters that ZeRO 3 keeps elsewhere are empty here, and pass
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return f"{kind} {name}"
    return None
