"""One worker's part of a training run, from the folder of shards to the trained model.

No Ray and no DeepSpeed here: the engine is handed in, so that tests run the
whole path in one process::

    shards ──► model, optimizer (or the latest checkpoint's) ──► engine ──► TrainingLoop ──► <out>/model, summary.json
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from cluster.training.batches import Batch, TokenBatches, count_windows, validation_batches
from cluster.training.checkpointing import check_resumable, latest_checkpoint, read_checkpoint, write_checkpoint
from cluster.training.compilation import compile_blocks
from cluster.training.config import TrainConfig
from cluster.training.engine import Engine, TorchEngine
from cluster.training.loop import LoopHooks, TrainingLoop
from cluster.training.metrics import Line, MetricsLog
from cluster.training.objective import Objective
from cluster.training.shards import data_fingerprint, load_tokens, read_summary
from cluster.training.state import TrainingState
from cluster.training.stopping import StopSignals, is_stop_requested
from cluster.training.summary import summarize, write_results
from cluster.training.token_array import Tokens
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)

EngineBuilder = Callable[[MoETransformer, bool], Engine]
"""Makes an engine, which has an optimizer of its own, of a model and whether it is compiled."""


def run_training(
    model_config: ModelConfig,
    config: TrainConfig,
    build_engine: EngineBuilder,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any] | None:
    """Train a model, or go on with the run that ``config.out_folder`` holds.

    Args:
        model_config: shape and precision.
        config: the settings.
        build_engine: makes the engine of a model.
        device: where this worker computes.
        rank: of this worker.
        world_size: workers that train together.
    Returns:
        what ``summary.json`` holds, or ``None`` if the run was asked to stop; the same call resumes it.
    Raises:
        ConfigError: settings, model and data do not fit together.
        DataError: the shards cannot be read.
        CheckpointError: the folder holds another run, or its files cannot be read or written.
        TrainingError: the loss is not finite.
    """
    check_run(model_config, config)
    train_tokens, validation_tokens = (load_tokens(config.data_folder, split) for split in ("train", "validation"))
    fingerprint = data_fingerprint(train_tokens, validation_tokens)
    model, restore_optimizer, state = _start_or_resume(model_config, config, fingerprint)
    model.to(device)
    is_compiled = config.is_compiled and compile_blocks(model, config.compute_dtype)
    engine = build_engine(model, is_compiled)
    optimizer = engine.optimizer
    restore_optimizer(model, optimizer)
    batches = TokenBatches(train_tokens, config.batch_size // world_size, config.seq_len, config.seed, rank, world_size)
    peak_learning_rate = config.peak_for(model_config.precision)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        metrics = stack.enter_context(MetricsLog(config.out_folder, state.step)) if rank == 0 else None
        hooks = LoopHooks(
            train_batch=batches.at,
            validation_batches=partial(evaluation_batches, validation_tokens, config, world_size),
            append_line=metrics.append if metrics is not None else _ignore_line,
            save=lambda at: write_checkpoint(config.out_folder, model, optimizer, at, config, fingerprint),
            should_stop=lambda: signals.is_requested or is_stop_requested(config.out_folder),
        )
        objective = Objective(config.load_balance_weight, config.router_z_weight, is_compiled)
        result = TrainingLoop(engine, objective, config, peak_learning_rate, hooks).run(state)
    if result.evaluation is None:
        return None
    bytes_per_token = read_summary(config.data_folder).bytes_per_token
    summary = summarize(model, result.state, result.evaluation, peak_learning_rate, bytes_per_token, is_compiled)
    return write_results(config.out_folder, model, summary, config.data_folder) if rank == 0 else {}


def build_torch_engine(config: TrainConfig) -> EngineBuilder:
    """Return a builder of the plain engine, for one worker."""
    return lambda model, is_compiled: TorchEngine(model, config, is_compiled)


def check_run(model_config: ModelConfig, config: TrainConfig) -> None:
    """Check what can be checked before anything is started or loaded.

    Raises:
        ConfigError: settings, model and data do not fit together.
        DataError: there are no shards.
    """
    if config.seq_len > model_config.max_seq_len:
        raise ConfigError(
            f"seq_len {config.seq_len} exceeds the model's max_seq_len {model_config.max_seq_len}. "
            f"Lower the one or raise the other."
        )
    vocab_size = read_summary(config.data_folder).vocab_size
    if model_config.vocab_size != vocab_size:
        raise ConfigError(
            f"The model's vocab_size is {model_config.vocab_size}, the tokenizer of {config.data_folder} has "
            f"{vocab_size} tokens. Give vocab_size {vocab_size}."
        )


def evaluation_batches(tokens: Tokens, config: TrainConfig, world_size: int) -> Iterable[Batch]:
    """Return the first windows of the validation set in batches of the size that a worker trains with.

    A last batch that is not full is left out where there are others: another shape would
    be compiled anew.
    """
    num_windows = min(count_windows(tokens, config.seq_len), config.num_eval_batches * config.batch_size)
    if num_windows > config.batch_size:
        num_windows -= num_windows % config.batch_size
    return validation_batches(tokens, config.batch_size // world_size, config.seq_len, num_windows)


def _start_or_resume(
    model_config: ModelConfig, config: TrainConfig, fingerprint: str
) -> tuple[MoETransformer, Callable[[MoETransformer, Optimizer], None], TrainingState]:
    folder = latest_checkpoint(config.out_folder)
    if folder is None:
        torch.manual_seed(config.seed)  # the same weights on every worker
        return MoETransformer(model_config), _keep_fresh, TrainingState()
    check_resumable(folder, model_config, config, fingerprint)
    point = read_checkpoint(folder)
    logger.info("resuming after step %d/%d from %s", point.state.step, config.num_steps, folder)
    return point.model, point.restore_optimizer, point.state


def _keep_fresh(model: MoETransformer, optimizer: Optimizer) -> None:
    """A run from the start has no optimizer state to restore."""


def _ignore_line(line: Line) -> None:
    """Worker 0 alone writes metrics."""
