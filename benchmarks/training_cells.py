"""Train the cells of a plan, each in a process of its own with one thread, as many at once as there are cores.

    <folder>/<cell>/cell.json, and what a training run leaves: checkpoints/, metrics.jsonl, model/, summary.json

A cell with a ``result.json`` is finished. Ctrl-C lets the running cells write a checkpoint; the same command goes
on from there.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_plan import BATCH_SIZE, SEQ_LEN, Cell, Losses, model_config
from cluster.training.allocator import KEEP_FREED_MEMORY
from cluster.training.checkpoint_folder import CHECKPOINTS_FOLDER
from cluster.training.config import TrainConfig
from cluster.training.engine import TorchEngine
from cluster.training.evaluation import evaluate
from cluster.training.objective import Objective
from cluster.training.run import build_torch_engine, evaluation_batches, run_training
from cluster.training.shards import load_tokens
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.errors import TrainingError
from moe_bitnet.files import read_json, write_json_atomically
from moe_bitnet.model import MoETransformer

Result = dict[str, Any]
Results = dict[Cell, Result]
Plan = Callable[[Losses], list[Cell]]

_STOP_TIMEOUT_S = 120
_EVAL_BATCHES = 64
_QUICK_EVAL_BATCHES = 4


def run_cells(plan: Plan, folder: Path, num_jobs: int, is_quick: bool, progress: Callable[[str], None]) -> Results:
    """Train what is not finished of a plan, which may grow with what is.

    Args:
        plan: losses of finished cells → all cells known by now, the most needed first.
        folder: holds ``data-<corpus>`` and takes a folder a cell.
        num_jobs: processes at a time.
        is_quick: evaluate little, and do not compile.
        progress: takes a line of text.
    Returns:
        the result of every cell of the plan.
    Raises:
        TrainingError: a cell failed; the message holds its last lines.
    """
    results: Results = {}
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    try:
        while True:
            cells = _read_finished(plan, folder, results)
            waiting = [cell for cell in cells if cell not in results and cell not in running]
            while waiting and len(running) < num_jobs:
                cell = waiting.pop(0)
                running[cell] = _start(cell, folder, is_quick)
            if not running:
                return {cell: results[cell] for cell in cells}
            time.sleep(0.5)
            ended = [cell for cell, process in running.items() if process.poll() is not None]
            for cell in ended:
                _require_success(cell, running.pop(cell), folder)
                num_left = sum(1 for each in cells if each not in results and each not in ended)
                progress(f"{cell.name}: {_describe(folder / cell.name)}; {num_left} cells left of {len(cells)}")
    except BaseException:
        _stop(running)
        raise


def read_finished(plan: Plan, folder: Path) -> Results:
    """Return the results of the cells of a plan that are finished; nothing is trained."""
    results: Results = {}
    cells = _read_finished(plan, folder, results)
    return {cell: results[cell] for cell in cells if cell in results}


def _read_finished(plan: Plan, folder: Path, results: Results) -> list[Cell]:
    """Add the results of finished cells until the plan grows no more; returns its cells."""
    while True:
        cells = plan({cell: result["validation_loss"] for cell, result in results.items()})
        found = {
            cell: read_json(path)
            for cell in cells
            if cell not in results and (path := folder / cell.name / "result.json").is_file()
        }
        if not found:
            return cells
        results.update(found)


def _start(cell: Cell, folder: Path, is_quick: bool) -> "subprocess.Popen[bytes]":
    cell_folder = folder / cell.name
    settings = {
        "cell": dataclasses.asdict(cell),
        "data_folder": str(folder / f"data-{cell.corpus}"),
        "is_quick": is_quick,
    }
    write_json_atomically(cell_folder / "cell.json", settings)
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": "1"}
    with (cell_folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_cells", str(cell_folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the cells to stop
        )


def _require_success(cell: Cell, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    if process.returncode != 0:
        lines = (folder / cell.name / "output.txt").read_text(errors="replace").splitlines()[-5:]
        raise TrainingError(f"{cell.name} ended with status {process.returncode}: {' / '.join(lines)}")


def _stop(running: "dict[Cell, subprocess.Popen[bytes]]") -> None:
    """Ask cells to write a checkpoint and end; kill those that take too long."""
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for process in running.values():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _describe(folder: Path) -> str:
    result = read_json(folder / "result.json")
    return f"validation PPL {result['validation_ppl']:.2f} after {result['train_s']:.0f} s"


def train_cell(folder: Path) -> None:
    """Train the cell of a folder, or go on with it, and leave ``result.json``."""
    torch.set_num_threads(1)
    settings = read_json(folder / "cell.json")
    cell = Cell(**settings["cell"])
    config = model_config(cell.size, cell.precision)
    train_config = TrainConfig(
        data_folder=Path(settings["data_folder"]),
        out_folder=folder,
        num_steps=cell.num_steps,
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        peak_learning_rate=cell.peak_learning_rate,
        seed=cell.seed,
        eval_every_steps=max(1, cell.num_steps // 2),
        num_eval_batches=_QUICK_EVAL_BATCHES if settings["is_quick"] else _EVAL_BATCHES,
        num_kept_checkpoints=1,
        threads_per_worker=1,
        is_compiled=not settings["is_quick"],
    )
    summary = run_training(config, train_config, build_torch_engine(train_config), torch.device("cpu"))
    if summary is None:
        raise SystemExit("stopped, with a checkpoint")
    if cell.precision == "float":
        summary["rounded_validation_loss"] = _rounded_loss(folder / "model", train_config)
    write_json_atomically(folder / "result.json", summary)
    shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)


def _rounded_loss(model_folder: Path, train_config: TrainConfig) -> float:
    """Return the loss of a float model whose weights are rounded to ternary after training, activations to int8."""
    twin = load_model(model_folder)
    rounded = MoETransformer(twin.config.replace(precision="ternary"))
    rounded.load_state_dict(twin.state_dict())
    tokens = load_tokens(train_config.data_folder, "validation")
    objective = Objective(train_config.load_balance_weight, train_config.router_z_weight)
    engine = TorchEngine(rounded, train_config)
    return evaluate(engine, objective, evaluation_batches(tokens, train_config, world_size=1)).loss


if __name__ == "__main__":
    train_cell(Path(sys.argv[1]))
