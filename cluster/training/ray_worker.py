"""What each Ray worker of a training run executes: its part of the run, with DeepSpeed as the engine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from cluster.training.attempts import Attempt, append_attempt
from cluster.training.config import TrainConfig
from cluster.training.run import run_training
from moe_bitnet.config import ModelConfig

LOG_NAME = "train.log"


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Run this worker's part.

    Args:
        settings: ``model_config`` and ``train_config`` as dictionaries, ``num_threads`` and ``call``.
    Returns:
        what ``summary.json`` holds on worker 0, ``None`` after a stop.
    Raises:
        MoEBitNetError: the run cannot go on, and starting it again would not help.
    """
    from cluster.training.deepspeed_engine import DeepSpeedEngine

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    config = TrainConfig.from_dict(settings["train_config"])
    config = config.replace(num_workers=world_size)  # fewer than asked for, where hosts were lost
    device = ray.train.torch.get_device()
    # a local Ray may have been told of more CPUs than there are
    torch.set_num_threads(min(settings["num_threads"], os.cpu_count() or 1))
    if rank == 0:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_attempt(config.out_folder, Attempt(settings["call"], now, world_size, device.type))
    with _log_file(config.out_folder / LOG_NAME, is_active=rank == 0):
        return run_training(
            ModelConfig.from_dict(settings["model_config"]),
            config,
            lambda model, is_compiled: DeepSpeedEngine(model, config, is_compiled),
            device,
            rank,
            world_size,
        )


@contextmanager
def _log_file(path: Path, is_active: bool) -> Iterator[None]:
    """Append what our packages log to ``path``: a worker's own output does not reach the user."""
    if not is_active:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("cluster", "moe_bitnet")]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(handler)
        handler.close()
