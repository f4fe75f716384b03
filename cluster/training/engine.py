"""What the training loop asks of an engine, and the plain engine for one process.

The loop calls ``forward``, ``backward`` and ``step``; it does not know whether
DeepSpeed (:mod:`cluster.training.deepspeed_engine`) or torch alone answers.
"""

import copy
import math
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from cluster.training.config import ComputeDtype, TrainConfig
from cluster.training.fragments import Fragment, FragmentReader, load_whole, whole_fragments
from cluster.training.optimizer import build_optimizer, freeze_backbone, parameter_groups
from moe_bitnet.model import ModelOutput, MoETransformer


class Engine(Protocol):
    """Runs a model's forward and backward passes and its updates, alone or with other workers."""

    @property
    def model(self) -> MoETransformer:
        """The model itself, with float32 parameters."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that :meth:`step` uses."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def rank(self) -> int:
        """Number of this worker; worker 0 writes the files."""
        ...

    @property
    def world_size(self) -> int:
        """Workers that train together."""
        ...

    def forward(self, token_ids: Tensor) -> ModelOutput:
        """Score ``token_ids`` ``[B, S]`` in the compute dtype, to be followed by :meth:`backward`."""
        ...

    def predict(self, token_ids: Tensor) -> ModelOutput:
        """Score ``token_ids`` ``[B, S]`` as :meth:`forward` does; no backward pass follows."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this worker's ``loss``, averaged over all workers and the micro-steps of a step."""
        ...

    def step(self) -> float:
        """Clip the gradients, update the parameters, and clear the gradients.

        Returns:
            the norm of the whole gradient before clipping; if it is not finite, there was no update.
        """
        ...

    def take_dispatch_bytes(self) -> int:
        """Return the bytes that this worker sent to experts on others, and back to them, since the last call."""
        ...

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Add up a float64 tensor over all workers; every worker must call it."""
        ...

    def fragments(self) -> list[Fragment]:
        """Return what this worker keeps; disjoint, and together whole, over all workers."""
        ...

    def load(self, read: FragmentReader, optimizer_step: int) -> None:
        """Restore parameters and optimizer state from fragments that any engine wrote, on any number of workers.

        Args:
            read: gives runs of global tensors.
            optimizer_step: updates that were done.
        """
        ...

    def full_model(self) -> MoETransformer | None:
        """Return the whole model on the CPU on worker 0, ``None`` elsewhere; every worker must call it."""
        ...


class TorchEngine:
    """One process, torch alone: the reference that DeepSpeed is tested against.

    Args:
        model: on its device, with float32 parameters.
        config: of the run; the engine takes what concerns the optimizer, its dtype and its gradients.
        is_compiled: whether the blocks are compiled.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: MoETransformer,
        config: TrainConfig,
        is_compiled: bool = False,
    ) -> None:
        self.model = model
        if config.has_frozen_backbone:
            freeze_backbone(model)
        model.has_activation_checkpointing = config.has_activation_checkpointing
        self.optimizer: Optimizer = build_optimizer(parameter_groups(model), config.adam_beta1, config.adam_beta2)
        self.device = model.embedding.weight.device
        self._num_parts = config.gradient_accumulation_steps
        self._gradient_clipping = config.gradient_clipping
        self._compute_dtype: ComputeDtype = config.compute_dtype
        self._is_compiled = is_compiled

    def forward(self, token_ids: Tensor) -> ModelOutput:
        """Fulfil :class:`Engine`."""
        with autocast(self.device, self._compute_dtype):
            output: ModelOutput = self.model(token_ids)
        return output

    def predict(self, token_ids: Tensor) -> ModelOutput:
        """Fulfil :class:`Engine`."""
        return predict(self.model, token_ids, self._compute_dtype, self._is_compiled)

    def backward(self, loss: Tensor) -> None:
        """Fulfil :class:`Engine`."""
        (loss / self._num_parts).backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        """Fulfil :class:`Engine`."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._gradient_clipping))
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def take_dispatch_bytes(self) -> int:
        """Fulfil :class:`Engine`."""
        return 0

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Fulfil :class:`Engine`."""
        return values

    def fragments(self) -> list[Fragment]:
        """Fulfil :class:`Engine`."""
        return whole_fragments(self.model, self.optimizer)

    def load(self, read: FragmentReader, optimizer_step: int) -> None:
        """Fulfil :class:`Engine`."""
        load_whole(self.model, self.optimizer, read, optimizer_step)

    def full_model(self) -> MoETransformer:
        """Fulfil :class:`Engine`; the model itself where it is on the CPU."""
        return on_cpu(self.model)


def autocast(device: torch.device, compute_dtype: ComputeDtype) -> torch.autocast:
    """Return the context in which matrix products run in ``compute_dtype``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype == "bfloat16")


def on_cpu(model: MoETransformer) -> MoETransformer:
    """Return the model itself where it is on the CPU, else a copy there."""
    return model if model.embedding.weight.device.type == "cpu" else copy.deepcopy(model).cpu()


def predict(model: MoETransformer, token_ids: Tensor, compute_dtype: ComputeDtype, is_compiled: bool) -> ModelOutput:
    """Score ``token_ids`` with the numerics of training.

    Compiled blocks keep gradients switched on although nothing uses them: switching
    them off would compile every block a second time.
    """
    with torch.set_grad_enabled(is_compiled), autocast(model.embedding.weight.device, compute_dtype):
        output: ModelOutput = model(token_ids)
    return output
