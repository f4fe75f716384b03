"""Train through Ray Train: start workers, wait, and bring home the summary or the error.

The only file of this folder that imports Ray. The workers run
:func:`cluster.training.run.run_training` with DeepSpeed as the engine; their progress is read from the
files of ``out_folder``, which every worker and the caller must see. What Ray itself
stores there is deleted at the end: the checkpoints that count are our own.
"""

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch

from cluster.config import ClusterConfig
from cluster.runtime import connect
from cluster.training.config import TrainConfig
from cluster.training.metrics import METRICS_NAME
from cluster.training.progress import MetricsFollower, OnProgress
from cluster.training.run import check_run, run_training
from cluster.training.stopping import request_stop, withdraw_stop
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ClusterError, MoEBitNetError, TrainingError

logger = logging.getLogger(__name__)

LOG_NAME = "train.log"
_RAY_FOLDER = "ray"
# What a worker may take to finish its step (the first one compiles) and to write a checkpoint.
_STOP_TIMEOUT_S = 180.0
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a finished worker is noticed after that, not after 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less to start; a lost host is noticed all the same
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; silences its warning
}
# Freed tensors stay mapped: without these, glibc returns large ones to the kernel and each new one
# faults its pages in again (log-softmax over the vocabulary: 58 ms instead of 4).
_WORKER_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    cluster_config: ClusterConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train a model, or go on with the run that ``train_config.out_folder`` holds.

    Uses the Ray that this process is connected to; else connects to ``cluster_config.address``, or
    starts a local Ray and shuts it down again. Ctrl-C lets the workers finish their step and write a
    checkpoint; a second one does not wait for that. A worker that dies is restarted once, from the last checkpoint.

    Args:
        model_config: shape and precision.
        train_config: the settings.
        cluster_config: how to reach Ray.
        on_progress: called, in a thread, with each new line of ``metrics.jsonl``.
    Returns:
        what ``<out>/summary.json`` holds.
    Raises:
        ConfigError: settings, model, data or an earlier run in the folder do not fit together.
        DataError: the shards cannot be read.
        CheckpointError: the folder holds another run, or its files cannot be read or written.
        TrainingError: the loss is not finite, or another process called ``request_stop``.
        ClusterError: Ray does not answer, has too few CPUs, or a worker died twice.
        KeyboardInterrupt: Ctrl-C; the same call resumes.
    """
    config = train_config.replace(
        data_folder=train_config.data_folder.resolve(), out_folder=train_config.out_folder.resolve()
    )
    check_run(model_config, config)
    withdraw_stop(config.out_folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, config.out_folder / _RAY_FOLDER, ignore_errors=True)
        stack.enter_context(_environment(_DRIVER_ENVIRONMENT))
        stack.enter_context(connect(cluster_config))
        if on_progress is not None:
            stack.enter_context(MetricsFollower(config.out_folder / METRICS_NAME, on_progress))
        return _wait_for(_build_trainer(model_config, config), config.out_folder)


def _build_trainer(model_config: ModelConfig, config: TrainConfig) -> Any:
    has_gpus = _check_resources(config.num_workers)
    num_threads = config.threads_per_worker or _threads_per_worker(config.num_workers)
    environment = {"OMP_NUM_THREADS": str(num_threads), **_WORKER_ALLOCATOR, **_DRIVER_ENVIRONMENT}
    if not has_gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "model_config": model_config.to_dict(),
            "train_config": config.to_dict(),
            "num_threads": num_threads,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=has_gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if has_gpus else {})},
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(config.out_folder / _RAY_FOLDER),
            failure_config=ray.train.FailureConfig(max_failures=1, controller_failure_limit=0),
            worker_runtime_env={"env_vars": environment},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Run in each worker process.

    Returns:
        ``{"summary": ...}`` (``None`` after a stop), or ``{"error": ...}`` with an exception of ours: raised
        here, Ray would take it for a crash and start the worker again. With several workers it is
        raised all the same, so that Ray ends those who wait for this one.
    """
    from cluster.training.deepspeed_engine import DeepSpeedEngine

    config = TrainConfig.from_dict(settings["train_config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # a local Ray may have been told of more CPUs than there are
    torch.set_num_threads(min(settings["num_threads"], os.cpu_count() or 1))
    try:
        with _log_file(config.out_folder / LOG_NAME, is_active=rank == 0):
            summary = run_training(
                ModelConfig.from_dict(settings["model_config"]),
                config,
                lambda model, is_compiled: DeepSpeedEngine(model, config, is_compiled),
                ray.train.torch.get_device(),
                rank,
                world_size,
            )
    except MoEBitNetError as error:
        if world_size > 1:
            raise
        return {"error": error}
    return {"summary": summary}


def _wait_for(trainer: Any, out_folder: Path) -> dict[str, Any]:
    """Run ``trainer.fit()`` in a thread: in the main thread Ray would answer Ctrl-C itself, without a checkpoint."""
    fit = _FitThread(trainer)
    try:
        fit.start()
        while not fit.is_done.wait(0.2):
            pass
    except (KeyboardInterrupt, SystemExit):
        logger.warning("stopping after this step, with a checkpoint; interrupt once more to stop at once")
        request_stop(out_folder)
        fit.is_done.wait(_STOP_TIMEOUT_S)
        raise
    outcome = fit.outcome()
    if "error" in outcome:
        raise outcome["error"]
    if outcome["summary"] is None:
        raise TrainingError(
            f"{out_folder}: the run was asked to stop and wrote a checkpoint. Call train again to resume."
        )
    summary: dict[str, Any] = outcome["summary"]
    return summary


class _FitThread(threading.Thread):
    """Keeps what ``trainer.fit()`` returns or raises.

    It is waited for by ``is_done``: in Python 3.11 a ``join`` that Ctrl-C interrupts takes the thread for ended.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self.is_done = threading.Event()
        self._trainer = trainer
        self._outcome: dict[str, Any] | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._outcome = self._trainer.fit().return_value
        except Exception as error:  # noqa: BLE001 - raised again by outcome(), in the caller's thread
            self._error = error
        finally:
            self.is_done.set()

    def outcome(self) -> dict[str, Any]:
        """Return what worker 0 returned; raise what went wrong as one of our exceptions where it is one."""
        if self._error is not None:
            raise _translate(self._error) from self._error
        assert self._outcome is not None
        return self._outcome


def _translate(error: Exception) -> Exception:
    """Find the exception that a user should see behind those of Ray."""
    if isinstance(error, ray.train.WorkerGroupError):
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
        for cause in causes:
            if isinstance(cause, MoEBitNetError):
                return cause
        if any(isinstance(cause, ray.exceptions.RayError) for cause in causes):
            reason = str(causes[0]).strip().splitlines()[0]
            return ClusterError(
                f"A training worker died, and died again after a restart ({reason}). Is there enough memory? "
                f"The same command resumes from the last checkpoint."
            )
    if isinstance(error, (ray.train.ControllerError, ray.exceptions.RayError)):
        return ClusterError(f"Ray stopped the training ({str(error).strip().splitlines()[-1]}).")
    return error


def _check_resources(num_workers: int) -> bool:
    """Check that the workers can be placed; Ray would wait for ever.

    Returns:
        whether every worker gets a GPU.
    Raises:
        ClusterError: there are too few free CPUs.
    """
    available = ray.available_resources()
    if available.get("CPU", 0) < num_workers:
        raise ClusterError(
            f"Ray has {available.get('CPU', 0):g} free CPUs, {num_workers} workers need one each. "
            f"Give fewer workers, or free the CPUs."
        )
    return bool(available.get("GPU", 0) >= num_workers)


def _threads_per_worker(num_workers: int) -> int:
    """Divide the CPUs of the smallest host among the workers that it gets when they are spread evenly."""
    hosts = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    workers_per_host = -(-num_workers // len(hosts))
    return max(1, int(min(hosts)) // workers_per_host)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set yet, for a while."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


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
