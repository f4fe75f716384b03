"""What a training run is to be: a preset, changed by a file of settings, changed by options of the command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.training.config import TrainConfig
from cluster.training.shards import read_summary
from moe_bitnet.checkpoint.native import read_info
from moe_bitnet.cli.presets import PRESETS, Preset
from moe_bitnet.cli.run_folder import DEFAULT_RUN, RunFolder
from moe_bitnet.cli.train_file import TrainFile, read_train_file
from moe_bitnet.config import ModelConfig, Precision
from moe_bitnet.errors import ConfigError, DataError

DEFAULT_PRESET = "demo"
# Option of the command line (as argparse stores it) → field of TrainConfig.
TRAIN_OPTIONS = {
    "steps": "num_steps",
    "batch_size": "batch_size",
    "seq_len": "seq_len",
    "learning_rate": "peak_learning_rate",
    "seed": "seed",
    "num_workers": "num_workers",
    "min_workers": "min_workers",
    "expert_parallel": "expert_parallel",
    "zero_stage": "zero_stage",
    "exchange_dtype": "exchange_dtype",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "activation_checkpointing": "has_activation_checkpointing",
    "compute_dtype": "compute_dtype",
    "initial_model": "initial_model",
    "checkpoint_every": "checkpoint_every_s",
    "max_restarts": "max_restarts",
    "compile": "is_compiled",
}


@dataclass(frozen=True)
class TrainSettings:
    """A run before its data is looked at.

    Attributes:
        model: fields of ``ModelConfig``; ``vocab_size`` may be missing.
        train_config: the settings.
        source: what to call the model's fields in an error.
    """

    model: dict[str, Any]
    train_config: TrainConfig
    source: str

    def model_config(self) -> ModelConfig:
        """Return the model, with the vocabulary of the data's tokenizer where none is given.

        Raises:
            ConfigError: the sizes are impossible or missing.
            DataError: there is no data.
        """
        model, data_folder = self.model, self.train_config.data_folder
        if not (data_folder / "tokenizer.json").is_file():
            raise DataError(
                f"{data_folder}: holds no token shards. Run 'moe-bitnet data --run {data_folder.parent}' first, "
                f"or give another data_folder."
            )
        if "vocab_size" not in model:
            model = {**model, "vocab_size": read_summary(data_folder).vocab_size}
        return ModelConfig.from_dict(model, source=self.source)


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """Return what the options of ``moe-bitnet train`` ask for.

    Raises:
        ConfigError: a file cannot be read, or settings are unknown, impossible or contradict each other.
    """
    file = read_train_file(args.config_file) if args.config_file else TrainFile()
    given = {field: value for option, field in TRAIN_OPTIONS.items() if (value := getattr(args, option)) is not None}
    train = {**file.train, **given}
    if args.config:
        model = ModelConfig.from_json(args.config).to_dict()
    elif train.get("initial_model") and not (args.size or file.preset or file.model):
        model = read_info(Path(train["initial_model"])).config.to_dict()  # a run must have its initial model's shape
    else:
        model = file.model
    name = args.size or file.preset or (None if model and not args.config else DEFAULT_PRESET)
    preset = PRESETS[name] if name else None
    precision: Precision = args.precision or model.get("precision", "ternary")
    base = preset_settings(preset, precision, is_length_kept="num_steps" not in train)
    train_config = TrainConfig.from_dict({**base, **train, **_folders(args, file, precision)}, source=file.source)
    if not args.config:
        model = {"max_seq_len": train_config.seq_len, **(preset.shape if preset else {}), **model}
    source = str(args.config or file.source)
    return TrainSettings({**model, "precision": precision}, train_config, source)


def preset_train_config(run_folder: RunFolder, preset: Preset, precision: Precision, **changes: Any) -> TrainConfig:
    """Return a preset's settings for one precision, with ``changes``."""
    folders = {"data_folder": run_folder.data, "out_folder": run_folder.training(precision)}
    return TrainConfig(**{**folders, **preset_settings(preset, precision, is_length_kept=True), **changes})


def preset_settings(preset: Preset | None, precision: Precision, is_length_kept: bool) -> dict[str, Any]:
    """Return the fields of ``TrainConfig`` that a preset gives; its warm-up only where its number of steps stays."""
    if preset is None:
        return {}
    settings = {
        "num_steps": preset.num_steps,
        "batch_size": preset.batch_size,
        "seq_len": preset.seq_len,
        "peak_learning_rate": preset.peak_learning_rates.get(precision),
    }
    return {**settings, "warmup_steps": preset.warmup_steps} if is_length_kept else settings


def _folders(args: argparse.Namespace, file: TrainFile, precision: str) -> dict[str, Path]:
    """Return the folders of data and results: those of ``--run``, else the file's, else those of the default run."""
    run_folder = RunFolder(args.run or DEFAULT_RUN)
    folders = {"data_folder": run_folder.data, "out_folder": run_folder.path / precision}
    if args.run:
        return folders
    return {name: _path(file, name) if name in file.train else folder for name, folder in folders.items()}


def _path(file: TrainFile, name: str) -> Path:
    value = file.train[name]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{file.source}: {name} is {value!r}; give the path of a folder.")
    return Path(value)
