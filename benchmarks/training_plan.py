"""Which models the quality benchmark trains, in which order, and at which learning rates.

A cell is one training run. Each precision's best peak learning rate is found by a sweep of its own, of whole runs, for
every size and corpus; only then are its other seeds known, and where the next sweep begins::

    small, code: sweep ──┬─► other seeds
                         ├─► small, prose: sweep from the same rate, twice and half of it ──► other seeds
                         └─► middle: sweep from the same rate and half of it ──► a second seed
                                          └─► large: sweep from half and a quarter of the best

A sweep goes on until its best rate lies between two others, or is the best of the next smaller size: a larger model
wants no more. The runs are whole because probes a fifth as long chose twice the best rate of ternary
(``docs/experiments.md``).

:func:`plan` is a pure function of what is finished, so that an interrupted table goes on where it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_bitnet.config import ModelConfig, Precision

Corpus = Literal["code", "prose"]

SIZES = ("small", "middle", "large")
COMPARED: tuple[Precision, ...] = ("ternary", "float", "int4-experts")
TRAINED: tuple[tuple[Corpus, str], ...] = (("code", "small"), ("code", "middle"), ("code", "large"), ("prose", "small"))
"""Corpus and size of what is trained; a sweep needs those before it."""
SEEDS = {"small": (0, 1, 2), "middle": (0, 1), "large": (0,)}
"""Seeds of each size; binary has the first alone."""

VOCAB_SIZE = 2048
BATCH_SIZE = 4
SEQ_LEN = 256
_FIRST_RATES: dict[Precision, tuple[float, ...]] = {
    "ternary": (2e-3, 4e-3, 8e-3),
    "float": (1e-3, 2e-3, 4e-3),
    "int4-experts": (1e-3, 2e-3, 4e-3),
    "binary": (4e-3, 8e-3),
}
_BEGINNINGS: dict[tuple[Corpus, str], tuple[str, tuple[float, ...]]] = {
    ("code", "middle"): ("small", (0.5, 1.0)),
    ("code", "large"): ("middle", (0.25, 0.5)),
    ("prose", "small"): ("small", (0.5, 1.0, 2.0)),
}
"""Where the other sweeps begin: the size whose best rate on code is known before, and factors of that rate."""
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
        num_steps: of a run.
    """
    sweeps, seeds = [], []
    for corpus, size in TRAINED:
        for precision in precisions(corpus, size):
            sweeps += sweep_of(losses, corpus, size, precision, num_steps)
            rate = best_rate(losses, corpus, size, precision, num_steps)
            if rate is not None and precision in COMPARED:
                seeds += [Cell(corpus, size, precision, rate, seed, num_steps) for seed in SEEDS[size]]
    return list(dict.fromkeys(sweeps + seeds))


def precisions(corpus: Corpus, size: str) -> tuple[Precision, ...]:
    """Return which models are trained."""
    return (*COMPARED, "binary") if (corpus, size) == TRAINED[0] else COMPARED


def sweep_of(losses: Losses, corpus: Corpus, size: str, precision: Precision, num_steps: int) -> list[Cell]:
    """Return the cells that decide a learning rate, from the lowest; empty if they are not known yet."""
    rates, highest = _FIRST_RATES[precision], None
    if (corpus, size) in _BEGINNINGS:
        known_size, factors = _BEGINNINGS[corpus, size]
        known = best_rate(losses, "code", known_size, precision, num_steps)
        rates = () if known is None else tuple(factor * known for factor in factors)
        highest = known if known_size != size else None
    return _widen([Cell(corpus, size, precision, rate, 0, num_steps) for rate in rates], losses, highest)


def best_rate(losses: Losses, corpus: Corpus, size: str, precision: Precision, num_steps: int) -> float | None:
    """Return the peak learning rate with the lowest validation loss, or ``None`` while its sweep is not finished."""
    cells = sweep_of(losses, corpus, size, precision, num_steps)
    if not cells or any(cell not in losses for cell in cells):
        return None
    return min(cells, key=lambda cell: losses[cell]).peak_learning_rate


def _widen(cells: list[Cell], losses: Losses, highest: float | None) -> list[Cell]:
    """Add lower rates while the lowest is the best, and higher ones while the highest is: a sweep ends between.

    Args:
        cells: that differ in the rate alone, the lowest first.
        losses: of what is finished.
        highest: no rate above this one is added.
    """
    while cells and all(cell in losses for cell in cells):
        best = min(cells, key=lambda cell: losses[cell])
        rate = best.peak_learning_rate
        if best == cells[0]:
            cells = [replace(best, peak_learning_rate=rate / 2), *cells]
        elif best == cells[-1] and (highest is None or rate < highest):
            cells = [*cells, replace(best, peak_learning_rate=rate * 2)]
        else:
            return cells
    return cells
