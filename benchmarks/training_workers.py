"""Steps of two workers, each a process with one thread: data-parallel and expert-parallel in turns, with their bytes.

    python -m benchmarks.training_workers RANK WORLD_SIZE STORE_FILE BATCH_SIZE SEQ_LEN TURNS COMPILED

``COMPILED`` is 0 or 1. Worker 0 prints one JSON object. Run by ``training_speed``.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.training_steps import SHAPE, stepper, take_turns, train_config
from cluster.training.allocator import KEEP_FREED_MEMORY
from cluster.training.compilation import compile_blocks
from cluster.training.expert_parallel.division import ExpertDivision
from cluster.training.expert_parallel.messages import RowLayout
from cluster.training.expert_parallel.traffic import exchange_bytes, expected_rows_per_token
from cluster.training.loop import StepResult
from moe_bitnet.errors import TrainingError
from moe_bitnet.model import MoETransformer

NUM_WARM = 3
_TIMEOUT_S = 900


@dataclass(frozen=True)
class WorkerTimes:
    """What worker 0 measured.

    Attributes:
        data_parallel_s: seconds of each step.
        expert_parallel_s: seconds of each step, in the same turns.
        dispatch_bytes: that one expert-parallel step of all workers exchanged, by the meter; the mean.
        formula_bytes: the traffic model's, for uniform routing.
    """

    data_parallel_s: tuple[float, ...]
    expert_parallel_s: tuple[float, ...]
    dispatch_bytes: float
    formula_bytes: float


def time_workers(num_workers: int, batch_size: int, seq_len: int, num_turns: int, is_compiled: bool) -> WorkerTimes:
    """Start the workers and wait for what worker 0 says.

    Args:
        num_workers: processes.
        batch_size: sequences of a step of all workers.
        seq_len: tokens of a sequence.
        num_turns: timed steps each way.
        is_compiled: compile the models.

    Raises:
        TrainingError: a worker failed; the message holds its last lines.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **KEEP_FREED_MEMORY,
    }
    with tempfile.TemporaryDirectory() as folder:
        numbers = (batch_size, seq_len, num_turns, int(is_compiled))
        arguments = [str(num_workers), str(Path(folder) / "store"), *map(str, numbers)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.training_workers", str(rank), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment, "LOCAL_RANK": str(rank)},
                text=True,
            )
            for rank in range(num_workers)
        ]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise TrainingError(f"a worker ended with status {process.returncode}: {errors[-500:]}")
    return WorkerTimes(**json.loads(outputs[0][0].splitlines()[-1]))


def run_worker(
    rank: int, world_size: int, store: str, batch_size: int, seq_len: int, num_turns: int, wants_compiled: int
) -> None:
    """Run one worker's part."""
    from cluster.training.deepspeed_engine import DeepSpeedEngine  # imports DeepSpeed

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    dispatch_bytes: list[float] = []
    steps: dict[str, Callable[[int], object]] = {}
    for name, degree in (("data", 1), ("expert", world_size)):
        config = train_config(batch_size, seq_len, num_workers=world_size, expert_parallel=degree, zero_stage=1)
        torch.manual_seed(0)
        model = MoETransformer(SHAPE)
        is_compiled = bool(wants_compiled) and compile_blocks(model, config.compute_dtype)
        steps[name] = stepper(DeepSpeedEngine(model, config, is_compiled), config, SHAPE.vocab_size, is_compiled)

    def expert_step(step: int) -> None:
        result = steps["expert"](step)
        assert isinstance(result, StepResult)
        dispatch_bytes.append(result.dispatch_bytes)

    turns = take_turns({"data": steps["data"], "expert": expert_step}, num_turns, NUM_WARM)
    if rank == 0:
        times = WorkerTimes(
            tuple(turns.wall_s["data"]),
            tuple(turns.wall_s["expert"]),
            statistics.fmean(dispatch_bytes[NUM_WARM:]),
            formula_bytes(world_size, batch_size * seq_len),
        )
        print(json.dumps(asdict(times)), flush=True)
    dist.barrier()


def formula_bytes(num_workers: int, num_tokens: int) -> float:
    """Return the bytes of one step of all workers under uniform routing, gradients included."""
    layout = RowLayout(SHAPE.hidden_size, SHAPE.top_k, torch.int8, torch.bfloat16)
    rows = num_tokens * expected_rows_per_token(ExpertDivision(SHAPE.num_experts, num_workers), SHAPE.top_k)
    return SHAPE.num_layers * exchange_bytes(layout, rows, num_workers * (num_workers - 1))


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:8]))
