"""DeepSpeed as an :class:`~cluster.training.engine.Engine`: ZeRO stage 0, float32 parameters, our own AdamW.

The only file that imports deepspeed, and only when an engine is built. What it
works around (DeepSpeed 0.19.8 on a machine without a GPU):

- The accelerator is guessed from what is installed, with a warning: ``DS_ACCELERATOR=cpu`` decides it.
- ``init_distributed`` compiles a shared-memory operation for a minute that training never uses: it is
  marked as incompatible before.
- An autocast around the engine is switched off inside of it: autocast is configured in the engine instead,
  with no module whose gradients would travel in bfloat16.
- Without ``gradient_clipping`` it clips at 1.0; the value is always given.
"""

import copy
import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cluster.training.config import ComputeDtype, TrainConfig
from cluster.training.engine import predict
from cluster.training.fragments import Fragment, FragmentReader, load_whole, whole_fragments
from cluster.training.optimizer import build_optimizer
from moe_bitnet.model import ModelOutput, MoETransformer


class DeepSpeedEngine:
    """A DeepSpeed engine around a model and its optimizer.

    The process group must exist (Ray Train makes it); with one worker and none, one
    of a single process is made.

    Args:
        model: on its device, with float32 parameters; compiled before, if at all.
        config: of the run.
        is_compiled: whether the blocks are compiled.
    """

    def __init__(
        self,
        model: MoETransformer,
        config: TrainConfig,
        is_compiled: bool = False,
    ) -> None:
        self.model = model
        self.optimizer: Optimizer = build_optimizer(model, config.adam_beta1, config.adam_beta2)
        self.device = model.embedding.weight.device
        self._gradient_clipping = config.gradient_clipping
        self._compute_dtype: ComputeDtype = config.compute_dtype
        self._is_compiled = is_compiled
        deepspeed = _import_deepspeed(self.device)
        _make_process_group(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=_TupleOutput(model),
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": config.batch_size // self.world_size,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,  # done here: DeepSpeed keeps the norm for itself
                "zero_optimization": {"stage": 0},
                "torch_autocast": {
                    "enabled": config.compute_dtype == "bfloat16",
                    "dtype": "bfloat16",
                    "lower_precision_safe_modules": [],
                },
                "steps_per_print": 2**62,
            },
        )
        # one worker has nobody to average with, and copying all gradients for that costs 3 % of a step
        self._engine.enable_backward_allreduce = self.world_size > 1

    def forward(self, token_ids: Tensor) -> ModelOutput:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        return ModelOutput(*self._engine(token_ids))

    def predict(self, token_ids: Tensor) -> ModelOutput:
        """Fulfil :class:`~cluster.training.engine.Engine`; the engine, which prepares a backward pass, stays aside."""
        return predict(self.model, token_ids, self._compute_dtype, self._is_compiled)

    def backward(self, loss: Tensor) -> None:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        self._engine.backward(loss)

    def step(self) -> float:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._gradient_clipping))
        if math.isfinite(norm):
            self._engine.step()
        return norm

    def take_dispatch_bytes(self) -> int:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        return 0

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def fragments(self) -> list[Fragment]:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        return whole_fragments(self.model, self.optimizer, self.rank, self.world_size)

    def load(self, read: FragmentReader, optimizer_step: int) -> None:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        load_whole(self.model, self.optimizer, read, optimizer_step)

    def full_model(self) -> MoETransformer | None:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        if self.rank:
            return None
        return self.model if self.device.type == "cpu" else copy.deepcopy(self.model).cpu()


class _TupleOutput(nn.Module):
    """Return a model's output as a tuple: DeepSpeed looks for tensors in tuples, not in dataclasses."""

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        output: ModelOutput = self.model(token_ids)
        return output.logits, output.router_probabilities, output.router_z_loss, output.tokens_per_expert


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # takes seconds, and looks at the variable above

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _make_process_group(device: torch.device) -> None:
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
