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

# Found by a sweep at 1.1M active parameters; larger models want less (BitNet b1.58 uses 1.5e-3 at 700M).
DEFAULT_PEAK_LEARNING_RATE: dict[Precision, float] = {"ternary": 8e-3, "float": 4e-3}
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
        seed: of the initial weights and of the order of the batches.
        compute_dtype: autocast dtype of matrix products; parameters and losses are float32 either way.
        eval_every_steps: steps between evaluations; the last step is always evaluated.
        num_eval_batches: batches of the validation set in an evaluation, from its start.
        checkpoint_every_s: seconds between checkpoints; the last step always leaves one.
        num_kept_checkpoints: newest checkpoints that stay.
        num_workers: training processes (data parallel).
        threads_per_worker: threads of a worker's kernels; ``None`` divides the CPUs evenly.
        is_compiled: compile blocks and cross entropy with ``torch.compile``, where a compiler is found.

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
    seed: int = 0
    compute_dtype: ComputeDtype = "bfloat16"
    eval_every_steps: int = 100
    num_eval_batches: int = 16
    checkpoint_every_s: float = 120.0
    num_kept_checkpoints: int = 2
    num_workers: int = 1
    threads_per_worker: int | None = None
    is_compiled: bool = True

    def __post_init__(self) -> None:
        for name in ("data_folder", "out_folder"):
            value = getattr(self, name)
            if not isinstance(value, (str, Path)) or not str(value):
                raise ConfigError(f"TrainConfig: {name} is {value!r}; give the path of a folder.")
            object.__setattr__(self, name, Path(value))
        self._check_counts()
        self._check_numbers()
        if self.compute_dtype not in get_args(ComputeDtype):
            allowed = ", ".join(get_args(ComputeDtype))
            raise ConfigError(f"TrainConfig: compute_dtype is {self.compute_dtype!r}; allowed are {allowed}.")
        if not isinstance(self.is_compiled, bool):
            raise ConfigError(f"TrainConfig: is_compiled is {self.is_compiled!r}; give true or false.")
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(_MAX_WARMUP_STEPS, self.num_steps // 10))
        if self.num_warmup_steps >= self.num_steps:
            raise ConfigError(
                f"TrainConfig: warmup_steps {self.warmup_steps} leaves nothing of num_steps {self.num_steps}. "
                f"Give at most {self.num_steps - 1}, or more steps."
            )
        if self.batch_size % self.num_workers:
            raise ConfigError(
                f"TrainConfig: batch_size {self.batch_size} cannot be divided among num_workers {self.num_workers}. "
                f"Give a multiple of {self.num_workers}."
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
        ):
            _check_integer(name, getattr(self, name), smallest=1)
        _check_integer("seed", self.seed, smallest=0)
        if self.warmup_steps is not None:
            _check_integer("warmup_steps", self.warmup_steps, smallest=0)
        if self.threads_per_worker is not None:
            _check_integer("threads_per_worker", self.threads_per_worker, smallest=1)

    def _check_numbers(self) -> None:
        for name in ("gradient_clipping", "checkpoint_every_s"):
            _check_number(name, getattr(self, name), is_zero_allowed=False)
        for name in ("weight_decay", "load_balance_weight", "router_z_weight"):
            _check_number(name, getattr(self, name), is_zero_allowed=True)
        for name in ("adam_beta1", "adam_beta2"):
            _check_number(name, getattr(self, name), is_zero_allowed=True)
            if getattr(self, name) >= 1:
                raise ConfigError(f"TrainConfig: {name} is {getattr(self, name)!r}; give a number from 0 to below 1.")
        if self.peak_learning_rate is not None:
            _check_number("peak_learning_rate", self.peak_learning_rate, is_zero_allowed=False)

    @property
    def num_warmup_steps(self) -> int:
        """``warmup_steps`` as a number: the default is filled in."""
        assert self.warmup_steps is not None
        return self.warmup_steps

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
