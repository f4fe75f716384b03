"""DeepSpeed as an :class:`~cluster.training.engine.Engine`: ZeRO 0 to 3, expert parallelism, our own AdamW.

Parameters are float32. With ``deepspeed_state`` the only file that knows DeepSpeed, which is imported when an engine is
built. What it works around (DeepSpeed 0.19.8):

- On a machine without a GPU the accelerator is guessed from what is installed, with a warning: ``DS_ACCELERATOR=cpu``
  decides it.
- ``init_distributed`` compiles a shared-memory operation for a minute that training never uses: it is
  marked as incompatible before.
- An autocast around the engine is switched off inside of it: autocast is switched on within the module that it runs.
- Without ``gradient_clipping`` it clips at 1.0; the value is always given. At stage 0 the norm is kept from us, so that
  clipping is done here.
- Expert parallelism is recognised by a layer of its own class in the model: an empty one is put there. What such a
  model needs besides are the marks on the experts' parameters and groups of their own in the optimizer.
- Gradients are reduced in buckets that are sent when they are full. Workers with different numbers of experts would
  fill them at different times and wait for each other for ever: one bucket holds all.
- ZeRO 3 fetches the parameters of modules that are called and return tensors; where ours do not, it is told.
"""

import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cluster.training.config import TrainConfig
from cluster.training.deepspeed_state import ZeroState
from cluster.training.engine import autocast, on_cpu, predict
from cluster.training.expert_parallel.division import check_expert_parallel
from cluster.training.expert_parallel.exchange import ExpertGroup
from cluster.training.expert_parallel.sharding import (
    empty_model,
    gather_model,
    mark_for_group,
    shard_experts,
)
from cluster.training.fragments import Fragment, FragmentReader, load_whole, whole_fragments
from cluster.training.optimizer import build_optimizer, freeze_backbone, parameter_groups
from cluster.transport.meter import TrafficMeter
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError
from moe_bitnet.model import ModelOutput, MoETransformer
from moe_bitnet.moe import MoELayer

logger = logging.getLogger(__name__)


class DeepSpeedEngine:
    """A DeepSpeed engine around a model, and an optimizer for it.

    The process group must exist (Ray Train makes it); with one worker and none, one
    of a single process is made. Every worker must build its engine, and from the same weights.

    Args:
        model: whole, on its device, with float32 parameters; compiled before, if at all. With expert parallelism it
            keeps this worker's experts alone.
        config: of the run; ``batch_size`` is that of all workers.
        is_compiled: whether the blocks are compiled.

    Raises:
        ConfigError: the number of workers does not fit the config.
    """

    def __init__(self, model: MoETransformer, config: TrainConfig, is_compiled: bool = False) -> None:
        self.model, self._config, self._is_compiled = model, config, is_compiled
        self.device = model.embedding.weight.device
        self._deepspeed = deepspeed = _import_deepspeed(self.device)
        _make_process_group(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        _check_world_size(model.config, config, self.world_size)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        if config.has_frozen_backbone:
            freeze_backbone(model)
        model.has_activation_checkpointing = config.has_activation_checkpointing
        self._meter, self._counted_bytes = TrafficMeter(), 0
        self._workers: ExpertGroup | None = None
        module = _TupleOutput(model, config)
        if config.expert_parallel > 1:
            self._workers = ExpertGroup(_expert_parallel_group(config.expert_parallel), self._meter)
            shard_experts(model, self._workers, config.exchange_dtype, is_compiled)
            mark_for_group(model, _group_name(config.expert_parallel))
            module.marker = _expert_marker(config.expert_parallel, model.config.num_experts)
        self.optimizer: Optimizer = build_optimizer(_groups_for_deepspeed(model), config.adam_beta1, config.adam_beta2)
        if config.stage == 3:
            self._declare_parameters(module)
        self._engine, zero, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=_deepspeed_config(model, config, self.world_size)
        )
        self._state = ZeroState(model, zero, self.optimizer, config.stage, self.rank, self.world_size)
        # one worker has nobody to average with, and copying all gradients for that costs 3 % of a step
        if config.stage == 0:
            self._engine.enable_backward_allreduce = self.world_size > 1
        self._num_backwards = 0

    def forward(self, token_ids: Tensor) -> ModelOutput:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        return ModelOutput(*self._engine(token_ids))

    def predict(self, token_ids: Tensor) -> ModelOutput:
        """Fulfil :class:`~cluster.training.engine.Engine`; the engine, which prepares a backward pass, stays aside."""
        if self._config.stage < 3:
            return predict(self.model, token_ids, self._config.compute_dtype, self._is_compiled)
        self._engine.eval()  # its hooks gather the parameters
        try:
            with torch.no_grad():
                return ModelOutput(*self._engine(token_ids))
        finally:
            self._engine.train()

    def backward(self, loss: Tensor) -> None:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        self._engine.backward(loss)
        self._num_backwards += 1
        if self._num_backwards < self._config.gradient_accumulation_steps:
            self._engine.step()  # counts the micro-step

    def step(self) -> float:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        self._num_backwards = 0
        if self._config.stage == 0:
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.gradient_clipping))
            if math.isfinite(norm):
                self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def take_dispatch_bytes(self) -> int:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        total = self._meter.inter_device_bytes()
        taken, self._counted_bytes = total - self._counted_bytes, total
        return taken

    @property
    def meter(self) -> TrafficMeter:
        """What this worker sent to experts on others, and back to them."""
        return self._meter

    def fragments(self) -> list[Fragment]:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        if self._config.stage == 0:
            return whole_fragments(self.model, self.optimizer, self.rank, self.world_size)
        return self._state.fragments()

    def load(self, read: FragmentReader, optimizer_step: int) -> None:
        """Fulfil :class:`~cluster.training.engine.Engine`."""
        if self._config.stage == 0:
            load_whole(self.model, self.optimizer, read, optimizer_step)
        else:
            self._state.load(read, optimizer_step)

    def full_model(self) -> MoETransformer | None:
        """Fulfil :class:`~cluster.training.engine.Engine`; the model itself where it is whole and on the CPU."""
        if self._workers is not None:
            return gather_model(self.model, self._workers)
        if self._config.stage == 3:
            return self._gather_parameters()
        if self.rank:
            return None
        return on_cpu(self.model)

    def _declare_parameters(self, module: nn.Module) -> None:
        """Tell ZeRO 3 where parameters are used: it follows modules that are called, and tensors that they return."""
        from deepspeed.utils import set_z3_leaf_modules

        # experts are not called but run, and a router returns a dataclass: their layer is fetched as a whole
        set_z3_leaf_modules(self.model, [MoELayer])
        is_tied = self.model.config.has_tied_embeddings
        head = self.model.embedding if is_tied else self.model.lm_head  # its weight is used outside of it
        self._deepspeed.zero.register_external_parameter(module, head.weight)

    def _gather_parameters(self) -> MoETransformer | None:
        whole = None if self.rank else empty_model(self.model)
        for name, parameter in self.model.named_parameters():
            with self._deepspeed.zero.GatheredParameters([parameter]):  # one at a time: the model may not fit
                if whole is not None:
                    whole.get_parameter(name).data = parameter.detach().to("cpu", copy=True)
        return whole


class _TupleOutput(nn.Module):
    """Return a model's output as a tuple: DeepSpeed looks for tensors in tuples, not in dataclasses."""

    def __init__(self, model: MoETransformer, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._compute_dtype = config.compute_dtype

    def forward(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        with autocast(token_ids.device, self._compute_dtype):
            output: ModelOutput = self.model(token_ids)
        return output.logits, output.router_probabilities, output.router_z_loss, output.tokens_per_expert


def _deepspeed_config(model: MoETransformer, config: TrainConfig, world_size: int) -> dict[str, Any]:
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    num_parts = world_size * config.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // num_parts,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping if config.stage else 0.0,
        "zero_optimization": {
            "stage": config.stage,
            "overlap_comm": False,
            "reduce_bucket_size": num_elements,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _groups_for_deepspeed(model: MoETransformer) -> list[dict[str, Any]]:
    """Return the optimizer's groups, with divided experts in groups of their own."""
    groups = []
    for group in parameter_groups(model):
        names = {getattr(parameter, "group_name", None) for parameter in group["params"]}
        for name in sorted(names, key=str):
            parameters = [each for each in group["params"] if getattr(each, "group_name", None) == name]
            mark = {} if name is None else {"moe": True, "name": name}
            groups.append({**group, "params": parameters, **mark})
    return groups


def _check_world_size(model_config: ModelConfig, config: TrainConfig, world_size: int) -> None:
    check_expert_parallel(model_config, config)
    num_parts = world_size * config.gradient_accumulation_steps
    if config.batch_size % num_parts or world_size % config.expert_parallel:
        raise ConfigError(
            f"{world_size} workers cannot share batch_size {config.batch_size} in {config.gradient_accumulation_steps} "
            f"gradient_accumulation_steps with expert_parallel {config.expert_parallel}. Give a number of workers that "
            f"expert_parallel divides, and a batch_size that is a multiple of {num_parts}."
        )


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


def _group_name(expert_parallel: int) -> str:
    return f"ep_size_{expert_parallel}"  # DeepSpeed's own name


def _expert_parallel_group(expert_parallel: int) -> dist.ProcessGroup:
    """Make DeepSpeed's groups: ranks that follow each other share experts, ranks that far apart copy each other."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(expert_parallel)
    group: dist.ProcessGroup = groups._get_expert_parallel_group(_group_name(expert_parallel))
    return group


def _expert_marker(expert_parallel: int, num_experts: int) -> nn.Module:
    """Return an empty layer by which DeepSpeed recognises a model with divided experts."""
    from deepspeed.moe.layer import MoE

    class ExpertMarker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size = num_experts, expert_parallel
            self.expert_group_name = _group_name(expert_parallel)

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups were made before."""

    return ExpertMarker()
