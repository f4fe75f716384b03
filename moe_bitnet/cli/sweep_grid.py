"""The grid of a sweep: sizes × precisions × learning rates × seeds, from a TOML file and options.

::

    [sweep]
    sizes = ["tiny", "wide"]            # presets, or tables of [sizes]
    precisions = ["ternary", "float"]
    learning_rates = [4e-3, 8e-3]       # left out: the best known of each precision
    seeds = [0, 1]

    [sizes.wide]                        # fields of ModelConfig, as in [model] of 'moe-bitnet train'
    preset = "tiny"
    hidden_size = 64

    [train]                             # fields of TrainConfig, for all cells
    num_steps = 600
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from cluster.training.config import TrainConfig
from cluster.training.sweep import SweepCell
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.train_file import MODEL_FIELDS, TRAIN_FIELDS, read_tables
from moe_bitnet.cli.train_settings import preset_settings
from moe_bitnet.config import ModelConfig, Precision
from moe_bitnet.errors import ConfigError

_AXES = ("sizes", "precisions", "learning_rates", "seeds")
# What a cell's place in the grid decides, and what one process without DeepSpeed cannot do.
_NOT_FOR_CELLS = (
    "data_folder", "out_folder", "peak_learning_rate", "seed", "num_workers", "min_workers", "expert_parallel",
    "zero_stage", "exchange_dtype", "threads_per_worker", "max_restarts",
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What is varied, and what stays.

    Attributes:
        sizes: presets, or keys of ``shapes``.
        precisions: of the models.
        learning_rates: peaks; ``None`` is the best known of the size and precision.
        seeds: of weights and batches.
        shapes: fields of ``ModelConfig`` by name; ``preset`` names one that they change.
        train: fields of ``TrainConfig`` for all cells.
        source: what to call it in an error.
    """

    sizes: tuple[str, ...] = ("tiny", "demo")
    precisions: tuple[Precision, ...] = get_args(Precision)
    learning_rates: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    shapes: dict[str, dict[str, Any]] | None = None
    train: dict[str, Any] | None = None
    source: str = "sweep"

    def cells(self, data_folder: Path, vocab_size: int, folder: Path, cpus_per_cell: int) -> list[SweepCell]:
        """Return the cells, the cheapest sizes first if they are named in that order.

        Args:
            data_folder: token shards.
            vocab_size: of their tokenizer.
            folder: takes a folder a cell.
            cpus_per_cell: threads of a cell.
        Raises:
            ConfigError: a size is unknown, or settings are impossible.
        """
        cells = []
        for size, precision, rate, seed in product(self.sizes, self.precisions, self.learning_rates, self.seeds):
            preset, shape = self._shape(size)
            train = {
                **(self.train or {}),
                "data_folder": data_folder,
                "seed": seed,
                "threads_per_worker": cpus_per_cell,
            }
            base = preset_settings(preset, precision, is_length_kept="num_steps" not in train)
            if rate is not None:
                train["peak_learning_rate"] = rate
            config = TrainConfig.from_dict({**base, **train, "out_folder": folder}, source=self.source)
            peak = config.peak_for(precision)
            name = f"{size}-{precision}-lr{peak:g}-seed{seed}"
            model = {"max_seq_len": config.seq_len, **shape, "vocab_size": vocab_size, "precision": precision}
            model_config = ModelConfig.from_dict(model, source=f"{self.source}: size {size}")
            cells.append(
                SweepCell(size, model_config, config.replace(out_folder=folder / name, peak_learning_rate=peak))
            )
        return list({cell.name: cell for cell in cells}.values())

    def _shape(self, size: str) -> tuple[Any, dict[str, Any]]:
        """Return a size's preset, if it has one, and its fields."""
        shape = dict((self.shapes or {}).get(size, {"preset": size}))
        name = shape.pop("preset", None)
        if name is not None and name not in PRESETS:
            allowed = ", ".join([*PRESETS, *(self.shapes or {})])
            raise ConfigError(
                f"{self.source}: there is no size {name!r}. Allowed are {allowed}, and tables [sizes.NAME]."
            )
        preset = PRESETS[name] if name is not None else None
        return preset, {**(preset.shape if preset else {}), **shape}


def read_grid(path: Path | None, **options: Sequence[Any] | None) -> Grid:
    """Return the grid of a file; options that are given override it.

    Args:
        path: TOML file, or ``None`` for the default grid.
        options: ``sizes``, ``precisions``, ``learning_rates``, ``seeds``; ``None`` leaves one to the file.
    Raises:
        ConfigError: the file cannot be read, or holds what it may not.
    """
    train_fields = tuple(name for name in TRAIN_FIELDS if name not in _NOT_FOR_CELLS)
    tables: dict[str, dict[str, Any]] = {"sweep": {}, "sizes": {}, "train": {}}
    if path is not None:
        tables = read_tables(path, {"sweep": _AXES, "sizes": None, "train": train_fields})
    source = str(path) if path else "sweep"
    for name, shape in tables["sizes"].items():
        unknown = sorted(set(shape) - {"preset", *MODEL_FIELDS}) if isinstance(shape, dict) else [name]
        if unknown:
            allowed = ", ".join(("preset", *MODEL_FIELDS))
            raise ConfigError(f"{source}: unknown keys in [sizes.{name}]: {', '.join(unknown)}. Allowed are {allowed}.")
    axes = {**tables["sweep"], **{name: list(values) for name, values in options.items() if values is not None}}
    _check_axes(axes, source)
    axes = {name: tuple(values) for name, values in axes.items()}
    return Grid(**axes, shapes=tables["sizes"], train=tables["train"], source=source)


def _check_axes(axes: dict[str, Any], source: str) -> None:
    kinds: dict[str, Any] = {"sizes": str, "precisions": str, "learning_rates": (int, float), "seeds": int}
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{source}: {name} is {values!r}; give a list of at least one.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, kinds[name]):
                raise ConfigError(f"{source}: {name} holds {value!r}, which is none.")
    for precision in axes.get("precisions", ()):
        if precision not in get_args(Precision):
            raise ConfigError(
                f"{source}: precision {precision!r} is unknown; allowed are {', '.join(get_args(Precision))}."
            )
