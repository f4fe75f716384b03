"""Checkpoints in the background: training goes on while a thread of each worker writes a copy.

::

    begin:   copy what this worker keeps ──► thread: write the part ──► "written"
    observe: all workers have written (the step's message says so) ──► worker 0, thread: complete and name the folder
    finish:  wait for both; at the end of a run

Workers agree by numbers that travel with the message that the training loop sends each step anyway. One checkpoint
is under way at a time. Where one worker fails to write, all of them stop with the same error, and the checkpoints
before stay.
"""

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from cluster.training.agreement import share_texts, tell_all
from cluster.training.checkpoint_folder import (
    checkpoint_path,
    commit,
    delete_old,
    delete_unfinished,
    unfinished_path,
    write_part,
)
from cluster.training.config import TrainConfig
from cluster.training.engine import Engine
from cluster.training.fragments import Fragment
from cluster.training.state import TrainingState
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """One worker's part in writing a run's checkpoints; all workers call the same methods at the same points.

    Args:
        engine: of this worker; for messages.
        model_config: of the whole model.
        config: the settings; names the folder and how many checkpoints stay.
        data_fingerprint: of the data.
    """

    def __init__(self, engine: Engine, model_config: ModelConfig, config: TrainConfig, data_fingerprint: str) -> None:
        self._engine = engine
        self._model_config = model_config
        self._config = config
        self._data_fingerprint = data_fingerprint
        if engine.rank == 0:  # before the message: after it others may begin to write
            delete_unfinished(config.out_folder)
        self._attempt = int(tell_all(engine, [float(secrets.randbelow(2**40))])[0])
        self._state = TrainingState()
        self._task: _Task | None = None
        self._is_committing = False
        self._is_abandoned = False  # its loss turned out to be bad

    @property
    def is_idle(self) -> bool:
        """Whether no checkpoint is under way, as far as this worker knows; worker 0 is the last one to know."""
        return self._task is None

    def begin(self, state: TrainingState, fragments: Sequence[Fragment]) -> None:
        """Copy ``fragments`` to the CPU and start to write them as the checkpoint after ``state.step`` steps."""
        assert self._task is None, "the checkpoint before is still under way"
        self._state, self._is_abandoned = state, False
        # the copy is what is written: the next step changes the originals
        copies = [
            replace(fragment, values=fragment.values.detach().to("cpu", torch.float32, copy=True))
            for fragment in fragments
        ]
        rank, world_size = self._engine.rank, self._engine.world_size
        self._task = _Task(partial(write_part, self._unfinished, copies, rank, world_size))

    def signals(self) -> tuple[float, float]:
        """Return this worker's numbers for the next message: 1 if its part is written, 1 if it failed.

        Worker 0 notices here that a checkpoint is complete.
        """
        if self._task is None or self._task.is_running:
            return 0.0, 0.0
        if self._task.error is not None:
            return 0.0, 1.0
        if self._is_committing:
            self._end()
            logger.info("step %d: wrote %s", self._state.step, self._path)
            return 0.0, 0.0
        return 1.0, 0.0

    def observe(self, num_written: float, num_failed: float) -> None:
        """Take the sums of all workers' :meth:`signals`.

        Raises:
            CheckpointError: a worker could not write; on all workers.
        """
        if num_failed:
            self._fail()
        if num_written == self._engine.world_size:
            self._task = None
            if self._engine.rank == 0:
                self._is_committing = True
                self._task = _Task(self._complete)

    def finish(self) -> None:
        """Wait until no checkpoint is under way on any worker.

        Raises:
            CheckpointError: a worker could not write; on all workers.
        """
        for _ in range(2):  # first until all parts are written, then until the folder has its name
            if self._task is not None:
                self._task.join()
            message = torch.tensor(self.signals(), dtype=torch.float64, device=self._engine.device)
            self.observe(*self._engine.sum_over_workers(message).tolist())

    def discard(self, step: int) -> None:
        """Give up the checkpoint after ``step`` steps, under way or written."""
        self._is_abandoned = self._state.step == step
        if self._engine.rank == 0:
            if self._is_committing and self._task is not None:
                self._task.join()
            shutil.rmtree(checkpoint_path(self._config.out_folder, step), ignore_errors=True)

    @property
    def _path(self) -> Path:
        return checkpoint_path(self._config.out_folder, self._state.step)

    @property
    def _unfinished(self) -> Path:
        return unfinished_path(self._config.out_folder, self._state.step, self._attempt)

    def _complete(self) -> None:
        if self._is_abandoned:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            return
        record = {
            "state": asdict(self._state),
            "data_fingerprint": self._data_fingerprint,
            "train_config": self._config.to_dict(),
        }
        commit(self._unfinished, self._path, self._engine.world_size, self._model_config, record)
        delete_old(self._config.out_folder, self._config.num_kept_checkpoints)

    def _end(self) -> None:
        self._task, self._is_committing = None, False

    def _fail(self) -> None:
        error = self._task.error if self._task is not None and not self._task.is_running else None
        texts = share_texts(self._engine, (str(error) or repr(error)) if error is not None else "")
        self._end()
        if self._engine.rank == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        reasons = "; ".join(f"worker {rank}: {text}" for rank, text in enumerate(texts) if text)
        raise CheckpointError(
            f"{self._path}: the checkpoint cannot be written ({reasons}). Free some disk space or choose another "
            f"out_folder; the same command resumes from the checkpoint before."
        )


class _Task:
    """Runs a function in a thread that a dying process does not wait for, and keeps its exception."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:  # noqa: BLE001 - the worker's own thread raises it, on all workers
            self.error = error
