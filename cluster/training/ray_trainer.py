"""Train through Ray Train: start workers, wait, and bring home the summary or the error.

Ray is imported by the files whose names begin with ``ray_`` alone. The workers run
:func:`cluster.training.ray_worker.train_worker`; their progress is read from the
files of ``out_folder``, which every worker and the caller must see. What Ray itself
stores there is deleted at the end: the checkpoints that count are our own.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch

from cluster.config import ClusterConfig
from cluster.runtime import connect
from cluster.training.allocator import KEEP_FREED_MEMORY
from cluster.training.config import TrainConfig
from cluster.training.metrics import METRICS_NAME
from cluster.training.progress import MetricsFollower, OnProgress
from cluster.training.ray_elastic import ElasticTrainer, allowed_worker_counts
from cluster.training.ray_failures import StopAtOurErrors, translate
from cluster.training.ray_gauges import TrainingGauges
from cluster.training.ray_worker import train_worker
from cluster.training.run import check_run
from cluster.training.stopping import request_stop, withdraw_stop
from cluster.training.summary import SETTINGS_NAME
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ClusterError, TrainingError
from moe_bitnet.files import write_json_atomically

logger = logging.getLogger(__name__)

_RAY_FOLDER = "ray"
# What a worker may take to finish its step (the first one compiles) and to write a checkpoint.
_STOP_TIMEOUT_S = 180.0
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a finished worker is noticed after that, not after 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less to start; a lost host is noticed all the same
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; silences its warning
}
# What Ray may take to free the CPUs of workers that just ended.
_FREE_TIMEOUT_S = 10.0
# Each lasts a minute (Ray's default): what a host may take to come back.
_MAX_START_TIMEOUTS = 10


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    cluster_config: ClusterConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train a model, or go on with the run that ``train_config.out_folder`` holds.

    Uses the Ray that this process is connected to; else connects to ``cluster_config.address``, or
    starts a local Ray and shuts it down again. Ctrl-C lets the workers finish their step and write a
    checkpoint; a second one does not wait for that.

    After a worker or its host died all workers start again from the last checkpoint, ``max_restarts`` times. With
    ``min_workers`` as many go on as find a place, in numbers that divide the batch: the batch stays the same, and so
    does the training but for rounding; once a minute Ray looks whether there is room for more again. Without
    ``min_workers`` the run waits ten minutes for a host to come back. An error of ours, such as a loss that is not
    finite, starts nothing again.

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
        TrainingError: the loss jumped or is not finite, or another process called ``request_stop``.
        ClusterError: Ray does not answer, has too few CPUs, or workers died more than ``max_restarts`` times.
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
        listener = _Listener(model_config, config, on_progress)
        stack.enter_context(MetricsFollower(config.out_folder / METRICS_NAME, listener.tell))
        return _wait_for(_build_trainer(model_config, config), config)


class _Listener:
    """Passes on each line of metrics; the first proves that the folder is this run's, and has its settings written."""

    def __init__(self, model_config: ModelConfig, config: TrainConfig, on_progress: OnProgress | None) -> None:
        self._settings = {"model": model_config.to_dict(), "training": config.to_dict()}
        self._path = config.out_folder / SETTINGS_NAME
        self._gauges = TrainingGauges(config.out_folder.name)
        self._on_progress = on_progress
        self._is_first = True

    def tell(self, line: dict[str, Any]) -> None:
        if self._is_first:
            write_json_atomically(self._path, self._settings)
            self._is_first = False
        self._gauges.tell(line)
        if self._on_progress is not None:
            self._on_progress(line)


def _build_trainer(model_config: ModelConfig, config: TrainConfig) -> Any:
    counts = allowed_worker_counts(config)
    has_gpus = _check_resources(counts[0])
    num_threads = config.threads_per_worker or _threads_per_worker(config.num_workers)
    environment = {"OMP_NUM_THREADS": str(num_threads), **KEEP_FREED_MEMORY, **_DRIVER_ENVIRONMENT}
    if not has_gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    settings = {
        "train_loop_config": {
            "model_config": model_config.to_dict(),
            "train_config": config.to_dict(),
            "num_threads": num_threads,
            "call": f"{time.time():.3f}",
        },
        "scaling_config": ray.train.ScalingConfig(
            num_workers=config.num_workers if len(counts) == 1 else (counts[0], counts[-1]),
            use_gpu=has_gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if has_gpus else {})},
            placement_strategy="SPREAD",
        ),
        "run_config": ray.train.RunConfig(
            name="run",
            storage_path=str(config.out_folder / _RAY_FOLDER),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_restarts, controller_failure_limit=_MAX_START_TIMEOUTS
            ),
            worker_runtime_env={"env_vars": environment},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=[StopAtOurErrors()],
        ),
    }
    if len(counts) == 1:
        return ray.train.torch.TorchTrainer(train_worker, **settings)
    return ElasticTrainer(train_worker, counts=counts, **settings)


def _wait_for(trainer: Any, config: TrainConfig) -> dict[str, Any]:
    """Run ``trainer.fit()`` in a thread: in the main thread Ray would answer Ctrl-C itself, without a checkpoint."""
    fit = _FitThread(trainer)
    try:
        fit.start()
        while not fit.is_done.wait(0.2):
            pass
    except (KeyboardInterrupt, SystemExit):
        logger.warning("stopping after this step, with a checkpoint; interrupt once more to stop at once")
        request_stop(config.out_folder)
        fit.is_done.wait(_STOP_TIMEOUT_S)
        raise
    if fit.error is not None:
        raise translate(fit.error, config.max_restarts) from fit.error
    if fit.summary is None:
        raise TrainingError(
            f"{config.out_folder}: the run was asked to stop and wrote a checkpoint. Call train again to resume."
        )
    return fit.summary


class _FitThread(threading.Thread):
    """Keeps what ``trainer.fit()`` returns or raises.

    It is waited for by ``is_done``: in Python 3.11 a ``join`` that Ctrl-C interrupts takes the thread for ended.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self.is_done = threading.Event()
        self._trainer = trainer
        self.summary: dict[str, Any] | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.summary = self._trainer.fit().return_value
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it again
            self.error = error
        finally:
            self.is_done.set()


def _check_resources(num_workers: int) -> bool:
    """Check that the workers can be placed; Ray would wait for ever.

    Returns:
        whether every worker gets a GPU.
    Raises:
        ClusterError: there are too few free CPUs.
    """
    deadline = time.monotonic() + _FREE_TIMEOUT_S
    while (available := ray.available_resources()).get("CPU", 0) < num_workers and time.monotonic() < deadline:
        time.sleep(0.2)
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
