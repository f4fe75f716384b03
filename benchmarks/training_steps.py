"""Training steps on random tokens, to be timed: a loop with any engine, and neither files nor evaluations."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.bare_loop import bare_loop
from cluster.training.batches import Batch
from cluster.training.config import TrainConfig
from cluster.training.engine import Engine
from moe_bitnet.config import ModelConfig

SHAPE = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_experts=8,
    top_k=2,
    max_seq_len=256,
)
"""21 million parameters, 7.8 million active."""

_LEARNING_RATE = 1e-4  # random tokens have nothing to learn; the routing stays as it is


def train_config(batch_size: int, seq_len: int, **changes: object) -> TrainConfig:
    """Return settings for steps that are only timed."""
    return TrainConfig(
        Path("unused"),
        Path("unused"),
        num_steps=1_000_000,
        batch_size=batch_size,
        seq_len=seq_len,
        peak_learning_rate=_LEARNING_RATE,
        warmup_steps=1,
        threads_per_worker=1,
        **changes,  # type: ignore[arg-type]
    )


def stepper(engine: Engine, config: TrainConfig, vocab_size: int, is_compiled: bool) -> Callable[[int], object]:
    """Return what runs one step of this worker, given its number."""
    rows = config.batch_size // engine.world_size

    def batch(step: int) -> Batch:
        draw = np.random.default_rng((step, engine.rank))
        tokens = draw.integers(0, vocab_size, (rows, config.seq_len + 1), dtype=np.int64)
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    return bare_loop(engine, config, _LEARNING_RATE, batch, is_compiled).step


def take_turns(steppers: dict[str, Callable[[int], object]], num_turns: int, num_warm: int) -> "Turns":
    """Time steps of several steppers in turns.

    Args:
        steppers: by name.
        num_turns: timed steps of each.
        num_warm: steps of each before, which compile and settle.
    """
    turns = Turns()
    for step in range(num_warm + num_turns):
        for name, run in steppers.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            run(step)
            if step >= num_warm:
                turns.add(name, time.perf_counter() - wall_s, time.process_time() - cpu_s)
    return turns


class Turns:
    """Seconds of steps by name, turn by turn.

    Attributes:
        wall_s: on the clock.
        cpu_s: of all threads of this process.
    """

    def __init__(self) -> None:
        self.wall_s: dict[str, list[float]] = {}
        self.cpu_s: dict[str, list[float]] = {}

    def add(self, name: str, wall_s: float, cpu_s: float) -> None:
        """Take one step."""
        self.wall_s.setdefault(name, []).append(wall_s)
        self.cpu_s.setdefault(name, []).append(cpu_s)

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Return the wall seconds of ``name`` over those of ``baseline``, turn by turn."""
        return [a / b for a, b in zip(self.wall_s[name], self.wall_s[baseline], strict=True)]
