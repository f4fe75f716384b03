"""``moe-bitnet train``: one model of any precision, through Ray Train and DeepSpeed.

Settings come from a TOML file, from options, or both: options override the file.
Run it again to go on after an interruption.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, get_args

from cluster.config import ClusterConfig
from cluster.training.config import ComputeDtype, ExchangeDtype, TrainConfig
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import say
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.reporting import write_training_report
from moe_bitnet.cli.train_file import render_train_file
from moe_bitnet.cli.train_settings import TrainSettings, settings_of
from moe_bitnet.cli.train_view import ProgressMode, training_view
from moe_bitnet.config import ModelConfig, Precision
from moe_bitnet.errors import MoEBitNetError

logger = logging.getLogger(__name__)

HELP = "train a model: ternary, binary, int4 experts, or the float twin; run again to go on after an interruption"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those without a default leave a setting to the file and the preset."""
    parser.set_defaults(run=None)
    parser.add_argument(
        "config_file",
        type=Path,
        nargs="?",
        metavar="CONFIG",
        help="TOML file of settings, such as --write-config prints",
    )
    parser.add_argument("--write-config", action="store_true", help="print these settings as a TOML file, and end")
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")
    parser.add_argument(
        "--progress",
        choices=get_args(ProgressMode),
        help="auto: a live view, or a line a step without a terminal; json: JSON lines on stderr (default: auto, or "
        "off with --json)",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--precision", choices=get_args(Precision), help="default: ternary")
    model.add_argument("--size", choices=sorted(PRESETS), help="shape and length (default: demo)")
    model.add_argument("--config", type=Path, metavar="FILE", help="JSON file with a model's shape")
    model.add_argument("--initial-model", type=Path, metavar="FOLDER", help="checkpoint whose weights it starts from")
    length = parser.add_argument_group("length and recipe")
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--batch-size", type=int, help="sequences a step, over all workers")
    length.add_argument("--seq-len", type=int, help="tokens a sequence")
    length.add_argument("--learning-rate", type=float, help="peak (default: the preset's for the precision)")
    length.add_argument("--seed", type=arguments.seed, help="of weights and batches (default: 0)")
    length.add_argument("--compute-dtype", choices=get_args(ComputeDtype), help="of matrix products")
    workers = parser.add_argument_group("workers")
    workers.add_argument("--num-workers", type=int, help="training processes (default: 1)")
    workers.add_argument("--min-workers", type=int, help="go on with as few when hosts are lost (default: wait)")
    workers.add_argument("--expert-parallel", type=int, help="workers that share one copy of the experts (default: 1)")
    workers.add_argument("--zero-stage", type=int, choices=range(4), help="what DeepSpeed divides among workers")
    workers.add_argument(
        "--exchange-dtype", choices=get_args(ExchangeDtype), help="of outputs and gradients on the way"
    )
    workers.add_argument("--gradient-accumulation-steps", type=int, metavar="N", help="parts of a worker's batch")
    workers.add_argument("--activation-checkpointing", action="store_true", default=None, help="less memory, slower")
    workers.add_argument("--no-compile", action="store_false", default=None, dest="compile", help="no torch.compile")
    workers.add_argument("--checkpoint-every", type=float, metavar="S", help="seconds between checkpoints")
    workers.add_argument("--max-restarts", type=int, metavar="N", help="restarts after workers died (default: 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; returns the summary of the run."""
    settings = settings_of(args)
    if args.write_config:
        return _write_config(settings, is_quiet=args.json)
    mode: ProgressMode = args.progress or ("off" if args.json else "auto")
    return train_run(settings.model_config(), settings.train_config, ClusterConfig(address=args.address), mode)


def train_run(
    model_config: ModelConfig,
    train_config: TrainConfig,
    cluster_config: ClusterConfig | None = None,
    mode: ProgressMode = "auto",
) -> dict[str, Any]:
    """Train and show it; returns the summary. However it ends, a report of what was trained is left."""
    from cluster.training.ray_trainer import train  # imports Ray, which the other subcommands do without

    title = f"train {model_config.precision}"
    if mode in ("auto", "lines"):
        say(f"{title} in {train_config.out_folder}; the first step waits for Ray and the compiler")
    try:
        with training_view(title, train_config, mode) as on_line:
            return train(model_config, train_config, cluster_config, on_progress=on_line)
    finally:
        _leave_report(train_config.out_folder, is_quiet=mode in ("json", "off"))


def _leave_report(out_folder: Path, is_quiet: bool) -> None:
    """Write what there is to report; a run that failed before its first step has nothing, and its error says why."""
    try:
        numbers = write_training_report(out_folder)
    except (MoEBitNetError, OSError) as error:
        logger.info("no report of %s: %s", out_folder, error)
    else:
        if not is_quiet:
            say(f"report: {numbers['report']}")


def _write_config(settings: TrainSettings, is_quiet: bool) -> dict[str, Any]:
    """Print settings as a TOML file; fields of the model that were not given show their defaults."""
    defaults = {
        each.name: each.default for each in dataclasses.fields(ModelConfig) if each.default is not dataclasses.MISSING
    }
    text = render_train_file({**defaults, **settings.model}, settings.train_config.to_dict())
    if is_quiet:
        return {"config": text}
    sys.stdout.write(text)
    return {}
