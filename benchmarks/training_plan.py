"""Which models the quality benchmark trains, in which order, and at which learning rates.

A cell is one training run. Each precision's best peak learning rate is found by a sweep of its own: of whole runs at
the smallest size, of probes a fifth as long at the two larger ones; only then are its other cells known::

    small: sweep ──► other seeds, prose, and the rates to probe at middle
    middle: probes ──► two seeds, and the rates to probe at large
    large: probes ──► one run

A sweep goes on until its best rate lies between two others, or is the best of the next smaller size. At the largest
size it stops at half of that.

:func:`plan` is a pure function of what is finished, so that an interrupted table goes on where it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_bitnet.config import ModelConfig, Precision

Corpus = Literal["code", "prose"]

SIZES = ("small", "middle", "large")
COMPARED: tuple[Precision, ...] = ("ternary", "float", "int4-experts")
SWEPT: tuple[Precision, ...] = (*COMPARED, "binary")
"""Precisions at the smallest size, on the code corpus; binary with one seed."""
SEEDS = {"small": (0, 1, 2), "middle": (0, 1), "large": (0,)}
"""Seeds of each size on the code corpus; prose is trained at the smallest, with as many."""

VOCAB_SIZE = 2048
BATCH_SIZE = 4
SEQ_LEN = 256
_PROBE_SHARE = 5
_FIRST_RATES: dict[Precision, tuple[float, ...]] = {
    "ternary": (2e-3, 4e-3, 8e-3),
    "float": (1e-3, 2e-3, 4e-3),
    "int4-experts": (1e-3, 2e-3, 4e-3),
    "binary": (4e-3, 8e-3),
}
_SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 128, "intermediate_size": 192, "num_layers": 4, "num_heads": 2},
    "middle": {"hidden_size": 256, "intermediate_size": 384, "num_layers": 5, "num_heads": 4},
    "large": {"hidden_size": 384, "intermediate_size": 640, "num_layers": 6, "num_heads": 6},
    "quick": {"hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 1},
    "quick-wide": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 1},
}


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        corpus: what it reads.
        size: name of its shape.
        precision: of the model.
        peak_learning_rate: of the schedule.
        seed: of weights and order.
        num_steps: optimizer steps.
    """

    corpus: Corpus
    size: str
    precision: Precision
    peak_learning_rate: float
    seed: int
    num_steps: int

    @property
    def name(self) -> str:
        """The cell's folder."""
        rate = f"{self.peak_learning_rate:g}"
        return f"{self.corpus}-{self.size}-{self.precision}-lr{rate}-seed{self.seed}-{self.num_steps}steps"


Losses = Mapping[Cell, float]
"""Validation loss of each finished cell, nats a token."""


def model_config(size: str, precision: Precision) -> ModelConfig:
    """Return a shape: 8 experts, top 2, the same sub-norms in every precision."""
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_kv_heads=min(2, _SHAPES[size]["num_heads"]),
        head_dim=64,
        num_experts=8,
        top_k=2,
        max_seq_len=SEQ_LEN,
        precision=precision,
        **_SHAPES[size],
    )


def plan(losses: Losses, num_steps: int) -> list[Cell]:
    """Return all cells that are known by now, the most needed first; finished ones are among them.

    Args:
        losses: of what is finished.
        num_steps: of a whole run.
    """
    cells = small_sweep(losses, num_steps)
    best = {precision: best_rate(losses, "small", precision, num_steps) for precision in COMPARED}
    cells += [
        Cell("code", "small", precision, rate, seed, num_steps)
        for precision in COMPARED
        for seed in SEEDS["small"][1:]
        if (rate := best[precision])
    ]
    cells += middle_probes(losses, num_steps)
    cells += large_probes(losses, num_steps)
    cells += [
        Cell("code", size, precision, rate, seed, num_steps)
        for size in ("large", "middle")  # the longest first: two cores then end together
        for seed in SEEDS[size]
        for precision in COMPARED
        if (rate := best_rate(losses, size, precision, num_steps))
    ]
    cells += [
        Cell("prose", "small", precision, rate, seed, num_steps)
        for seed in SEEDS["small"]
        for precision in COMPARED
        if (rate := best[precision])
    ]
    return list(dict.fromkeys(cells))


def small_sweep(losses: Losses, num_steps: int) -> list[Cell]:
    """Return the cells of the sweep at the smallest size."""
    cells: list[Cell] = []
    for precision, rates in _FIRST_RATES.items():
        cells += _widen([Cell("code", "small", precision, rate, 0, num_steps) for rate in rates], losses)
    return cells


def middle_probes(losses: Losses, num_steps: int) -> list[Cell]:
    """Return the short cells of the middle size: from the best rate of the smallest down."""
    return _probes(losses, "small", "middle", num_steps)


def large_probes(losses: Losses, num_steps: int) -> list[Cell]:
    """Return the short cells of the largest size: from the best rate of the middle one down."""
    return _probes(losses, "middle", "large", num_steps)


def sweep_of(losses: Losses, size: str, precision: Precision, num_steps: int) -> list[Cell]:
    """Return the cells that decide the learning rate of a size and precision; empty if they are not known yet."""
    sweep = {"small": small_sweep, "middle": middle_probes, "large": large_probes}[size]
    return [cell for cell in sweep(losses, num_steps) if cell.precision == precision]


def best_rate(losses: Losses, size: str, precision: Precision, num_steps: int) -> float | None:
    """Return the peak learning rate with the lowest validation loss, or ``None`` while its sweep is not finished."""
    cells = sweep_of(losses, size, precision, num_steps)
    if not cells or any(cell not in losses for cell in cells):
        return None
    return min(cells, key=lambda cell: losses[cell]).peak_learning_rate


def _probes(losses: Losses, smaller: str, size: str, num_steps: int) -> list[Cell]:
    cells: list[Cell] = []
    for precision in COMPARED:
        if rate := best_rate(losses, smaller, precision, num_steps):
            pair = [Cell("code", size, precision, factor * rate, 0, num_steps // _PROBE_SHARE) for factor in (0.5, 1.0)]
            cells += _widen(pair, losses)
    return cells


def _widen(cells: list[Cell], losses: Losses) -> list[Cell]:
    """Add lower rates while the lowest is the best, and higher ones while the highest is: a sweep ends between.

    Args:
        cells: that differ in the rate alone, the lowest first.
        losses: of what is finished.
    """
    while all(cell in losses for cell in cells):
        best = min(cells, key=lambda cell: losses[cell])
        if best == cells[0] and best.size != "large":
            cells = [replace(best, peak_learning_rate=best.peak_learning_rate / 2), *cells]
        elif best == cells[-1] and best.size == "small":
            # a larger model wants no more than a smaller one: there the highest rate is where the sweep begins
            cells = [*cells, replace(best, peak_learning_rate=best.peak_learning_rate * 2)]
        else:
            return cells
    return cells
