"""One worker's part of a training run, from the folder of shards to the trained model.

No Ray and no DeepSpeed here: the engine is handed in, so that tests run the
whole path in one process::

    shards ──► model ──► engine, filled from the newest checkpoint ──► TrainingLoop ──► <out>/model, summary.json
"""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.training.agreement import first_answers, tell_all
from cluster.training.batches import Batch, TokenBatches, count_windows, validation_batches
from cluster.training.checkpoint_folder import checkpoint_folders, checkpoint_path, checkpoint_step
from cluster.training.checkpoint_writer import CheckpointWriter
from cluster.training.checkpointing import check_resumable, latest_checkpoint, list_differences, read_checkpoint
from cluster.training.compilation import compile_blocks
from cluster.training.config import TrainConfig
from cluster.training.divergence import NUM_WATCHED_LOSSES
from cluster.training.engine import Engine, TorchEngine
from cluster.training.expert_parallel.division import check_expert_parallel
from cluster.training.loop import LoopHooks, TrainingLoop
from cluster.training.metrics import METRICS_NAME, Line, MetricsLog, read_losses
from cluster.training.objective import Objective
from cluster.training.shards import data_fingerprint, load_tokens, read_summary
from cluster.training.state import TrainingState
from cluster.training.stopping import StopSignals, is_stop_requested
from cluster.training.summary import summarize, write_results
from cluster.training.token_array import Tokens
from moe_bitnet.checkpoint.native import load_model, read_info
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError, MoEBitNetError, TrainingError
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
    model = _initial_model(model_config, config).to(device)
    is_compiled = config.is_compiled and compile_blocks(model, config.compute_dtype, config.stage)
    engine = build_engine(model, is_compiled)
    state = _resume(engine, model_config, config, fingerprint)
    num_parts = world_size * config.gradient_accumulation_steps  # micro-steps follow each other as steps do
    batches = TokenBatches(train_tokens, config.batch_size // num_parts, config.seq_len, config.seed, rank, world_size)
    peak_learning_rate = config.peak_for(model_config.precision)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        recent_losses = _recent_losses(engine, config, state.step)
        metrics = stack.enter_context(MetricsLog(config.out_folder, state.step)) if rank == 0 else None
        checkpoints = CheckpointWriter(engine, model_config, config, fingerprint)
        hooks = LoopHooks(
            train_batch=batches.at,
            validation_batches=partial(evaluation_batches, validation_tokens, config, world_size),
            append_line=metrics.append if metrics is not None else _ignore_line,
            checkpoints=checkpoints,
            should_stop=lambda: signals.is_requested or is_stop_requested(config.out_folder),
            recent_losses=recent_losses,
        )
        objective = Objective(config.load_balance_weight, config.router_z_weight, is_compiled)
        try:
            result = TrainingLoop(engine, objective, config, peak_learning_rate, hooks).run(state)
        except TrainingError:
            _complete_what_is_good(checkpoints)
            raise
    if result.evaluation is None:
        return None
    trained = engine.full_model()
    if trained is None:
        return {}
    bytes_per_token = read_summary(config.data_folder).bytes_per_token
    summary = summarize(trained, result.state, result.evaluation, peak_learning_rate, bytes_per_token, is_compiled)
    return write_results(config.out_folder, trained, summary, config.data_folder)


def build_torch_engine(config: TrainConfig) -> EngineBuilder:
    """Return a builder of the plain engine, for one worker."""
    return lambda model, is_compiled: TorchEngine(model, config, is_compiled)


def check_run(model_config: ModelConfig, config: TrainConfig) -> None:
    """Check what can be checked before anything is started or loaded.

    Raises:
        ConfigError: settings, model, initial model and data do not fit together.
        DataError: there are no shards.
        CheckpointError: the initial model is none.
    """
    if config.seq_len > model_config.max_seq_len:
        raise ConfigError(
            f"seq_len {config.seq_len} exceeds the model's max_seq_len {model_config.max_seq_len}. "
            f"Lower the one or raise the other."
        )
    check_expert_parallel(model_config, config)
    if config.initial_model is not None and not checkpoint_folders(config.out_folder):
        _check_initial_model(config.initial_model, model_config)
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


def _complete_what_is_good(checkpoints: CheckpointWriter) -> None:
    """Complete a checkpoint from before the step in which all workers stopped; that step's error counts more."""
    try:
        checkpoints.finish()
    except (MoEBitNetError, RuntimeError) as error:  # the latter: another worker died
        logger.warning("the checkpoint under way is lost: %s", error)


def _check_initial_model(folder: Path, model_config: ModelConfig) -> None:
    info = read_info(folder)
    if info.layout is not None:
        raise ConfigError(
            f"initial_model {folder} is packed ({info.layout}), and packed weights cannot be trained. Give the "
            f"checkpoint that it was packed from."
        )
    differences = list_differences(info.config.to_dict(), model_config.to_dict())
    if differences:
        raise ConfigError(
            f"initial_model {folder} is another model than the run's ({differences}). Give the run its config."
        )


def _initial_model(model_config: ModelConfig, config: TrainConfig) -> MoETransformer:
    """Make the model that a run starts from, the same on every worker; a resumed run overwrites it."""
    if config.initial_model is not None and not checkpoint_folders(config.out_folder):
        return load_model(config.initial_model).float().train()
    torch.manual_seed(config.seed)
    return MoETransformer(model_config)


def _resume(engine: Engine, model_config: ModelConfig, config: TrainConfig, fingerprint: str) -> TrainingState:
    """Load the newest checkpoint, if there is one; worker 0 finds it, each worker reads what it keeps."""

    def find_newest() -> int | None:
        folder = latest_checkpoint(config.out_folder)
        return None if folder is None else checkpoint_step(folder)

    step = first_answers(engine, find_newest)
    if step is None:
        return TrainingState()
    folder = checkpoint_path(config.out_folder, step)
    check_resumable(folder, model_config, config, fingerprint)
    point = read_checkpoint(folder)
    engine.load(point.read, point.state.step)
    logger.info("resuming after step %d/%d from %s", point.state.step, config.num_steps, folder)
    return point.state


def _recent_losses(engine: Engine, config: TrainConfig, step: int) -> list[float]:
    """Return the losses of the steps before a resumed one, the same on every worker."""
    path = config.out_folder / METRICS_NAME
    losses = read_losses(path, step, NUM_WATCHED_LOSSES) if engine.rank == 0 else []
    rest = [math.nan] * (NUM_WATCHED_LOSSES - len(losses))
    return [loss for loss in tell_all(engine, [*losses, *rest]) if math.isfinite(loss)]


def _ignore_line(line: Line) -> None:
    """Worker 0 alone writes metrics."""
