"""The settings of one training run: one frozen, flat dataclass, checked once.

A ternary model and its float twin are trained with the same settings; what
differs is ``ModelConfig.precision`` and, unless given, the peak learning rate.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moe_bitnet.config import Precision
from moe_bitnet.errors import ConfigError
from moe_bitnet.files import read_json, write_json_atomically

ComputeDtype = Literal["bfloat16", "float32"]
ExchangeDtype = Literal["bfloat16", "float32"]

# Found by a sweep at 1.1M active parameters; larger models want less (BitNet b1.58 uses 1.5e-3 at 700M).
DEFAULT_PEAK_LEARNING_RATE: dict[Precision, float] = {
    "ternary": 8e-3,
    "float": 4e-3,
    "int4-experts": 4e-3,
    "binary": 8e-3,
}
_EXPERT_PARALLEL_STAGES = (1, 2)
_NOT_WITH_ZERO_3 = {
    "has_frozen_backbone": "DeepSpeed misses the backward pass of layers whose inputs need no gradient",
    "has_activation_checkpointing": "DeepSpeed lets go of a block's parameters once it was computed again",
}
# What BitNet b1.58 warms up for; a short run takes a tenth of its steps instead.
_MAX_WARMUP_STEPS = 375
# Changing one of these on the way gives a run that is neither the old recipe nor the new one.
_RECIPE = (
    "num_steps",
    "batch_size",
    "seq_len",
    "peak_learning_rate",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "gradient_clipping",
    "load_balance_weight",
    "router_z_weight",
    "router_warmup_steps",
    "has_frozen_backbone",
    "seed",
    "compute_dtype",
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        data_folder: token shards, as written by :func:`cluster.training.shards.build_shards`.
        out_folder: takes checkpoints, metrics, the trained model and ``summary.json``; every worker must see it.
        num_steps: optimizer updates.
        batch_size: B, sequences in a step over all workers; a multiple of ``num_workers``.
        seq_len: S, tokens of a sequence.
        peak_learning_rate: where the warm-up ends; ``None`` takes the default of the model's precision.
        warmup_steps: steps of linear warm-up, below ``num_steps``; ``None`` takes a tenth of the steps, at most 375.
        adam_beta1: decay of the gradient's running mean.
        adam_beta2: decay of the squared gradient's running mean.
        weight_decay: of projection and expert matrices in the first half of the run; 0 in the second.
        gradient_clipping: largest norm of the whole gradient.
        load_balance_weight: of the routers' load-balance loss in the objective.
        router_z_weight: of the routers' z-loss in the objective.
        router_warmup_steps: steps in which the routers' learning rate rises from 0 to that of the others, beside
            the schedule: experts learn before the routing settles.
        initial_model: a checkpoint whose weights the run starts from, instead of random ones; its config must be
            the run's.
        has_frozen_backbone: train the routed experts, their norms and the routers alone; all else stays as it is.
        seed: of the initial weights and of the order of the batches.
        compute_dtype: autocast dtype of matrix products; parameters and losses are float32 either way.
        eval_every_steps: steps between evaluations; the last step is always evaluated.
        num_eval_batches: batches of the validation set in an evaluation, from its start.
        checkpoint_every_s: seconds between checkpoints; the last step always leaves one.
        num_kept_checkpoints: newest checkpoints that stay, beside the one with the lowest validation loss.
        num_workers: training processes; each takes its share of every batch.
        min_workers: go on with as few as these when workers or hosts are lost for good; ``None`` waits for all.
        expert_parallel: workers that share one copy of the routed experts, each holding a part of them; divides
            ``num_workers``. 1 keeps all experts on every worker.
        zero_stage: what DeepSpeed divides among workers: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters
            too. ``None`` takes 0, or 1 with expert parallelism, which allows 1 and 2 alone.
        exchange_dtype: of experts' outputs and gradients that travel between expert-parallel workers; ternary
            experts' inputs travel as int8 either way.
        gradient_accumulation_steps: parts that a worker computes its share of a batch in, one after the other.
        has_activation_checkpointing: compute each block again in the backward pass, rather than keep its activations.
        threads_per_worker: threads of a worker's kernels; ``None`` divides the CPUs evenly.
        is_compiled: compile blocks and cross entropy with ``torch.compile``, where a compiler is found.
        max_loss_rise: nats above the median of the last losses at which a run stops as diverged; ``None`` never does.
        max_restarts: how often workers are started again, from the last checkpoint, after one died.

    Raises:
        ConfigError: a value is not allowed; the message names it.
    """

    data_folder: Path
    out_folder: Path
    num_steps: int = 1000
    batch_size: int = 8
    seq_len: int = 256
    peak_learning_rate: float | None = None
    warmup_steps: int | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    load_balance_weight: float = 0.02
    router_z_weight: float = 0.001
    router_warmup_steps: int = 0
    initial_model: Path | None = None
    has_frozen_backbone: bool = False
    seed: int = 0
    compute_dtype: ComputeDtype = "bfloat16"
    eval_every_steps: int = 100
    num_eval_batches: int = 16
    checkpoint_every_s: float = 120.0
    num_kept_checkpoints: int = 2
    num_workers: int = 1
    min_workers: int | None = None
    expert_parallel: int = 1
    zero_stage: int | None = None
    exchange_dtype: ExchangeDtype = "bfloat16"
    gradient_accumulation_steps: int = 1
    has_activation_checkpointing: bool = False
    threads_per_worker: int | None = None
    is_compiled: bool = True
    max_loss_rise: float | None = 3.0
    max_restarts: int = 3

    def __post_init__(self) -> None:
        for name in ("data_folder", "out_folder"):
            value = getattr(self, name)
            if not isinstance(value, (str, Path)) or not str(value):
                raise ConfigError(f"TrainConfig: {name} is {value!r}; give the path of a folder.")
            object.__setattr__(self, name, Path(value))
        if self.initial_model is not None:
            object.__setattr__(self, "initial_model", Path(self.initial_model))
        self._check_counts()
        self._check_numbers()
        for name, choices in (("compute_dtype", ComputeDtype), ("exchange_dtype", ExchangeDtype)):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ConfigError(f"TrainConfig: {name} is {getattr(self, name)!r}; allowed are {allowed}.")
        for name in ("is_compiled", "has_frozen_backbone", "has_activation_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"TrainConfig: {name} is {getattr(self, name)!r}; give true or false.")
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(_MAX_WARMUP_STEPS, self.num_steps // 10))
        if self.num_warmup_steps >= self.num_steps:
            raise ConfigError(
                f"TrainConfig: warmup_steps {self.warmup_steps} leaves nothing of num_steps {self.num_steps}. "
                f"Give at most {self.num_steps - 1}, or more steps."
            )
        self._check_workers()

    def _check_workers(self) -> None:
        num_parts = self.num_workers * self.gradient_accumulation_steps
        if self.batch_size % num_parts:
            parts = f"num_workers {self.num_workers}"
            if self.gradient_accumulation_steps > 1:
                parts += f" in {self.gradient_accumulation_steps} gradient_accumulation_steps"
            raise ConfigError(
                f"TrainConfig: batch_size {self.batch_size} cannot be divided among {parts}. "
                f"Give a multiple of {num_parts}."
            )
        if self.num_workers % self.expert_parallel:
            raise ConfigError(
                f"TrainConfig: expert_parallel {self.expert_parallel} does not divide num_workers {self.num_workers}. "
                f"Give a divisor of {self.num_workers}."
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ConfigError(
                f"TrainConfig: min_workers {self.min_workers} exceeds num_workers {self.num_workers}. "
                f"Give at most {self.num_workers}."
            )
        if isinstance(self.zero_stage, bool) or self.zero_stage not in (None, 0, 1, 2, 3):
            raise ConfigError(f"TrainConfig: zero_stage is {self.zero_stage!r}; allowed are 0, 1, 2 and 3.")
        if self.expert_parallel > 1 and self.stage not in _EXPERT_PARALLEL_STAGES:
            reason = (
                "without ZeRO, DeepSpeed clips gradients by the norm of each worker's own experts, so that workers "
                "would drift apart"
                if self.zero_stage == 0
                else "ZeRO 3 divides every parameter among all workers, the experts too, and leaves no whole expert "
                "to send tokens to"
            )
            raise ConfigError(
                f"TrainConfig: expert_parallel {self.expert_parallel} does not work with zero_stage {self.zero_stage}: "
                f"{reason}. Give zero_stage 1 or 2, or expert_parallel 1."
            )

        for name, reason in _NOT_WITH_ZERO_3.items():
            if self.zero_stage == 3 and getattr(self, name):
                raise ConfigError(
                    f"TrainConfig: {name} does not work with zero_stage 3: {reason}. Give zero_stage 0, 1 or 2."
                )

    def _check_counts(self) -> None:
        for name in (
            "num_steps",
            "batch_size",
            "seq_len",
            "eval_every_steps",
            "num_eval_batches",
            "num_kept_checkpoints",
            "num_workers",
            "expert_parallel",
            "gradient_accumulation_steps",
        ):
            _check_integer(name, getattr(self, name), smallest=1)
        _check_integer("seed", self.seed, smallest=0)
        if self.warmup_steps is not None:
            _check_integer("warmup_steps", self.warmup_steps, smallest=0)
        for name in ("router_warmup_steps", "max_restarts"):
            _check_integer(name, getattr(self, name), smallest=0)
        for name in ("threads_per_worker", "min_workers"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), smallest=1)

    def _check_numbers(self) -> None:
        for name in ("gradient_clipping", "checkpoint_every_s"):
            _check_number(name, getattr(self, name), is_zero_allowed=False)
        for name in ("weight_decay", "load_balance_weight", "router_z_weight"):
            _check_number(name, getattr(self, name), is_zero_allowed=True)
        for name in ("adam_beta1", "adam_beta2"):
            _check_number(name, getattr(self, name), is_zero_allowed=True)
            if getattr(self, name) >= 1:
                raise ConfigError(f"TrainConfig: {name} is {getattr(self, name)!r}; give a number from 0 to below 1.")
        for name in ("peak_learning_rate", "max_loss_rise"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), is_zero_allowed=False)

    @property
    def num_warmup_steps(self) -> int:
        """``warmup_steps`` as a number: the default is filled in."""
        assert self.warmup_steps is not None
        return self.warmup_steps

    @property
    def stage(self) -> int:
        """``zero_stage`` as a number: without one, 0, or 1 with expert parallelism."""
        return int(self.expert_parallel > 1) if self.zero_stage is None else self.zero_stage

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all workers together see in a step."""
        return self.batch_size * self.seq_len

    def peak_for(self, precision: Precision) -> float:
        """Return the peak learning rate, or the default of ``precision`` if none was given."""
        if self.peak_learning_rate is not None:
            return self.peak_learning_rate
        return DEFAULT_PEAK_LEARNING_RATE[precision]

    def recipe(self) -> dict[str, Any]:
        """Return the settings that decide which weights come out; a resumed run must not change them."""
        return {name: getattr(self, name) for name in _RECIPE}

    def replace(self, **changes: Any) -> "TrainConfig":
        """Return a copy with ``changes``, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Any, source: str = "config") -> "TrainConfig":
        """Build a config from parsed JSON.

        Args:
            values: the parsed JSON value; must be an object with the fields of this class.
            source: what to call the input in an error, such as a file name.
        Raises:
            ConfigError: not an object, unknown or missing fields, or values that are not allowed.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a JSON object with settings, found {type(values).__name__}.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{source}: unknown fields {', '.join(unknown)}. Allowed are {', '.join(sorted(known))}.")
        missing = [name for name in ("data_folder", "out_folder") if name not in values]
        if missing:
            raise ConfigError(f"{source}: {' and '.join(missing)} must be given.")
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the settings as JSON."""
        write_json_atomically(path, self.to_dict())

    @classmethod
    def from_json(cls, path: Path) -> "TrainConfig":
        """Read settings from a JSON file.

        Raises:
            ConfigError: the file cannot be read, is not JSON, or holds values that are not allowed.
        """
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error}). Give a file of training settings.") from error
        return cls.from_dict(values, source=str(path))


def _check_integer(name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ConfigError(f"TrainConfig: {name} is {value!r}; give an integer of at least {smallest}.")


def _check_number(name: str, value: object, is_zero_allowed: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf") or (value == 0 and not is_zero_allowed):  # type: ignore[operator]
        allowed = "number of 0 or more" if is_zero_allowed else "positive number"
        raise ConfigError(f"TrainConfig: {name} is {value!r}; give a {allowed}.")
