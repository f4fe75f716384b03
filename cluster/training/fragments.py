"""Parameters and optimizer state as runs of global tensors, whoever keeps them.

A *global tensor* is one of the model that a single process would train: a parameter by its name there (with all
experts of its layer), or ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``. Workers keep runs of its flattened
elements, in any division; a checkpoint that knows name, start and values can be read by any other division::

    engine.fragments() of all workers ──► checkpoint ──► engine.load(read, optimizer_step) on any number of workers
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")

FragmentReader = Callable[[str, int, int], Tensor]
"""Name of a global tensor, first element, count → flat float32 of a checkpoint."""


@dataclass(frozen=True, eq=False)
class Fragment:
    """A run of one global tensor that this worker keeps.

    Attributes:
        name: ``<parameter>``, ``<parameter>.exp_avg`` or ``<parameter>.exp_avg_sq``.
        shape: of the whole global tensor, with all experts.
        start: first element in the flattened global tensor.
        values: flat float32, detached; may alias live memory: copy it before the next step.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def share_of(num_elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """Divide ``num_elements`` evenly in order; returns where the share of ``rank`` starts and how many it has."""
    start = num_elements * rank // world_size
    return start, num_elements * (rank + 1) // world_size - start


def whole_fragments(model: nn.Module, optimizer: Optimizer, rank: int = 0, world_size: int = 1) -> list[Fragment]:
    """Return this worker's share of what every worker has as a whole.

    Args:
        model: of the global names and shapes.
        optimizer: AdamW; a parameter without ``requires_grad`` has no state there.
        rank: of this worker.
        world_size: workers that divide the writing.
    """
    fragments = []
    for name, parameter in model.named_parameters():
        tensors = {name: parameter.detach()}
        if parameter.requires_grad:
            state = adam_state(optimizer, parameter)
            tensors |= {f"{name}.{moment}": state[moment] for moment in MOMENTS}
        start, count = share_of(parameter.numel(), rank, world_size)
        if count:
            fragments += [
                Fragment(key, tuple(parameter.shape), start, tensor.reshape(-1)[start : start + count])
                for key, tensor in tensors.items()
            ]
    return fragments


def load_whole(model: nn.Module, optimizer: Optimizer, read: FragmentReader, optimizer_step: int) -> None:
    """Fill a model and its optimizer from a checkpoint.

    Args:
        model: of the global names and shapes.
        optimizer: AdamW of the model's parameters.
        read: gives runs of global tensors.
        optimizer_step: updates that were done.
    """
    for name, parameter in model.named_parameters():
        targets = {name: parameter.detach()}
        if parameter.requires_grad:
            state = adam_state(optimizer, parameter)
            state["step"].fill_(optimizer_step)
            targets |= {f"{name}.{moment}": state[moment] for moment in MOMENTS}
        for key, target in targets.items():
            target.copy_(read(key, 0, parameter.numel()).view(parameter.shape))


def adam_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter: ``step``, ``exp_avg`` and ``exp_avg_sq``; zeros before the first step."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros(())  # stays on the CPU, as AdamW keeps it
        state.update({moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS})
    return state
