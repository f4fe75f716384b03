"""``moe-bitnet train``: one model, ternary or its float twin, through Ray Train and DeepSpeed."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from cluster.config import ClusterConfig
from cluster.training.config import TrainConfig
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import ProgressBar, progress_bar, say
from moe_bitnet.cli.presets import PRESETS, Preset
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.config import ModelConfig, Precision

HELP = "train the ternary model or its float twin; run again to go on after an interruption"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--precision", choices=get_args(Precision), default="ternary", help="default: ternary")
    parser.add_argument("--size", choices=sorted(PRESETS), default="demo", help="shape and length (default: demo)")
    parser.add_argument("--config", type=Path, help="JSON file with a model's shape, instead of the preset's")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="sequences a step (default: the preset's)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default: the preset's)")
    parser.add_argument("--learning-rate", type=float, help="peak (default: the preset's for the precision)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--num-workers", type=int, default=1, help="data-parallel workers (default: 1)")
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; returns the summary of the run."""
    preset = PRESETS[args.size]
    run_folder = RunFolder(args.run)
    vocab_size = run_folder.load_tokenizer().vocab_size
    model_config = preset.model_config(vocab_size, args.precision)
    if args.config:
        model_config = ModelConfig.from_json(args.config).replace(precision=args.precision)
    changes = {
        "num_steps": args.steps,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "peak_learning_rate": args.learning_rate,
        "seed": args.seed,
        "num_workers": args.num_workers,
        "is_compiled": not args.no_compile,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if args.steps is not None:
        given["warmup_steps"] = None  # a share of the steps
    train_config = preset_train_config(run_folder, preset, args.precision, **given)
    if not args.config:
        model_config = model_config.replace(max_seq_len=train_config.seq_len)
    return train_run(model_config, train_config, ClusterConfig(address=args.address))


def preset_train_config(run_folder: RunFolder, preset: Preset, precision: Precision, **changes: Any) -> TrainConfig:
    """Return a preset's settings for one precision, with ``changes``."""
    settings: dict[str, Any] = {
        "data_folder": run_folder.data,
        "out_folder": run_folder.training(precision),
        "num_steps": preset.num_steps,
        "batch_size": preset.batch_size,
        "seq_len": preset.seq_len,
        "warmup_steps": preset.warmup_steps,
        "peak_learning_rate": preset.peak_learning_rates[precision],
    }
    return TrainConfig(**{**settings, **changes})


def train_run(
    model_config: ModelConfig, train_config: TrainConfig, cluster_config: ClusterConfig | None = None
) -> dict[str, Any]:
    """Train with a progress bar; returns the summary."""
    from cluster.training.ray_trainer import train  # imports Ray, which the other subcommands do without

    say(
        f"training {model_config.precision} in {train_config.out_folder}; the first step waits for Ray and the compiler"
    )
    with progress_bar(f"train {model_config.precision}", train_config.num_steps) as bar:
        summary = train(model_config, train_config, cluster_config, on_progress=_show(bar))
        bar.update(train_config.num_steps, f"validation {summary['validation_loss']:.3f}")
    return summary


def _show(bar: ProgressBar) -> Callable[[dict[str, Any]], None]:
    validation = ""

    def show(line: dict[str, Any]) -> None:
        nonlocal validation
        if "validation_loss" in line:
            validation = f"  validation {line['validation_loss']:.3f}"
        if "loss" in line:
            remark = f"loss {line['loss']:.3f}{validation}  {line['tokens_per_s'] / 1000:.1f}k tok/s"
            bar.update(line["step"], remark)

    return show
