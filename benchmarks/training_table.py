"""What a table of training runs says: perplexities by size and precision, and ratios at equal parameters and bytes.

Results of cells enter, plain numbers leave; nothing is trained here.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.training_plan import COMPARED, Cell, Corpus, model_config
from moe_bitnet.checkpoint.stored_bytes import stored_bytes
from moe_bitnet.config import Precision

Results = Mapping[Cell, Mapping[str, Any]]
BestRate = Callable[[Corpus, str, Precision], float | None]


@dataclass(frozen=True)
class Entry:
    """All seeds of one model at its best learning rate.

    Attributes:
        corpus: what it read.
        size: name of its shape.
        precision: of the model.
        peak_learning_rate: the best of its sweep.
        losses: validation loss by seed, nats a token.
        num_active_parameters: that one token uses.
        stored_bytes: see :func:`moe_bitnet.checkpoint.stored_bytes.stored_bytes`.
        load_cv: by seed, std / mean of the experts' validation load, the mean of the layers.
        worst_load_cv: the largest of any layer and seed.
        num_dead_experts: experts of any layer and seed that no validation token visits.
        rounded_losses: by seed, of a float model rounded to ternary after training; empty for others.
    """

    corpus: Corpus
    size: str
    precision: Precision
    peak_learning_rate: float
    losses: tuple[float, ...]
    num_active_parameters: int
    stored_bytes: int
    load_cv: tuple[float, ...]
    worst_load_cv: float
    num_dead_experts: int
    rounded_losses: tuple[float, ...]

    @property
    def mean_loss(self) -> float:
        """Mean over seeds, nats a token."""
        return statistics.fmean(self.losses)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss: the geometric mean of the seeds' perplexities."""
        return math.exp(self.mean_loss)


def make_entry(cells: list[Cell], results: Results) -> Entry:
    """Gather the seeds of one model; ``cells`` differ in the seed alone."""
    first = cells[0]
    loads = [results[cell]["expert_load"] for cell in cells]
    variations = [[_variation(layer) for layer in load] for load in loads]
    return Entry(
        corpus=first.corpus,
        size=first.size,
        precision=first.precision,
        peak_learning_rate=first.peak_learning_rate,
        losses=tuple(float(results[cell]["validation_loss"]) for cell in cells),
        num_active_parameters=int(results[first]["num_active_parameters"]),
        stored_bytes=stored_bytes(model_config(first.size, first.precision)),
        load_cv=tuple(statistics.fmean(layers) for layers in variations),
        worst_load_cv=max(max(layers) for layers in variations),
        num_dead_experts=sum(share == 0 for load in loads for layer in load for share in layer),
        rounded_losses=tuple(
            float(results[cell]["rounded_validation_loss"])
            for cell in cells
            if "rounded_validation_loss" in results[cell]
        ),
    )


def gather(results: Results, best: BestRate) -> list[Entry]:
    """Return an entry for every corpus, size and precision that has a run at its best learning rate.

    Args:
        results: of finished cells.
        best: corpus, size, precision → peak learning rate, or ``None`` while it is not known.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in sorted(results, key=lambda cell: cell.seed):
        if cell.peak_learning_rate == best(cell.corpus, cell.size, cell.precision):
            groups.setdefault((cell.corpus, cell.size, cell.precision), []).append(cell)
    return [make_entry(cells, results) for cells in groups.values()]


def ratio_to_twin(ternary: Entry, twin: Entry) -> float:
    """Return the ternary perplexity over the twin's, over the seeds that both have."""
    pairs = list(zip(ternary.losses, twin.losses, strict=False))
    return math.exp(statistics.fmean(a - b for a, b in pairs))


def seed_ratios(ternary: Entry, twin: Entry) -> list[float]:
    """Return the ratio of perplexities seed by seed."""
    return [math.exp(a - b) for a, b in zip(ternary.losses, twin.losses, strict=False)]


@dataclass(frozen=True)
class EqualBytes:
    """A competitor's perplexity at the bytes of a ternary model.

    Attributes:
        perplexity: on the line between its sizes, log loss over log bytes; of its smallest where even that has
            more bytes, which favours the competitor.
        how: in words.
    """

    perplexity: float
    how: str


def at_bytes(entries: list[Entry], num_bytes: int) -> EqualBytes | None:
    """Return what a precision reaches with ``num_bytes``, from its sizes; ``None`` beyond its largest.

    Args:
        entries: of one precision and corpus.
        num_bytes: of the model to compare with.
    """
    by_bytes = sorted(entries, key=lambda entry: entry.stored_bytes)
    if not by_bytes or num_bytes > by_bytes[-1].stored_bytes:
        return None
    if num_bytes <= by_bytes[0].stored_bytes:
        smallest = by_bytes[0]
        excess = smallest.stored_bytes / num_bytes
        return EqualBytes(smallest.perplexity, f"its smallest model, which has {excess:.1f} times the bytes")
    index = next(i for i, entry in enumerate(by_bytes) if entry.stored_bytes >= num_bytes)
    below, above = by_bytes[index - 1], by_bytes[index]
    share = math.log(num_bytes / below.stored_bytes) / math.log(above.stored_bytes / below.stored_bytes)
    loss = below.mean_loss + share * (above.mean_loss - below.mean_loss)
    return EqualBytes(math.exp(loss), f"between its sizes {below.size} and {above.size}")


def select(entries: list[Entry], precision: Precision, corpus: Corpus = "code") -> list[Entry]:
    """Return the entries of one precision and corpus, in their order."""
    return [entry for entry in entries if entry.precision == precision and entry.corpus == corpus]


def competitors() -> tuple[Precision, ...]:
    """Return the precisions that ternary is compared with at equal bytes."""
    return tuple(precision for precision in COMPARED if precision != "ternary")


def _variation(load: list[float]) -> float:
    return statistics.pstdev(load) / statistics.fmean(load)
