"""How much a cache changes what a model says: divergence of next-token logits, perplexity, and needles that are found.

In: logits of one model over the same tokens, once with a reference cache and once with the cache in question. Out:
numbers. Nothing here knows a model or a cache; ``kvcache/hf/evaluation.py`` runs them.

The Kullback-Leibler divergence of a token's distribution is ``KLD = sum over words of p * (log p - log q)``, p being
the reference's: the nats that are lost by believing q. It is sensitive where perplexity is not, because it compares all
words at every position, and it can only be zero or more. Sums are float64: near 1e-5 nats float32 would show its own
rounding.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bitnet.errors import ConfigError, ShapeError

# Rows of logits whose float64 copies exist at one time.
_ROWS = 64

_PLACES = (
    "Lisbon", "Nairobi", "Quito", "Oslo", "Manila", "Dublin", "Havana", "Tunis", "Lima", "Seoul", "Vienna", "Accra",
    "Prague", "Bogota", "Hanoi", "Warsaw", "Riga", "Dakar", "Athens", "Madrid", "Cairo", "Kyoto", "Berlin", "Perth",
    "Geneva", "Delhi", "Sofia", "Tokyo", "Paris", "London", "Rome", "Boston",
)  # fmt: skip
_WORDS = (
    "banana", "violin", "hammer", "tiger", "window", "silver", "pepper", "rocket", "bottle", "garden", "purple",
    "monkey", "castle", "coffee", "dragon", "button", "camera", "forest", "guitar", "island", "ladder", "mirror",
    "needle", "orange", "pencil", "rabbit", "saddle", "ticket", "velvet", "wallet", "yellow", "basket",
)  # fmt: skip
MAX_NEEDLES = len(_PLACES)


@dataclass(frozen=True)
class LogitQuality:
    """What the logits of a cache say against those of the reference.

    Attributes:
        num_tokens: positions compared.
        kld_mean: nats a token.
        kld_standard_error: of ``kld_mean``, with positions taken as independent.
        kld_median: nats.
        kld_p999: nats; one position in a thousand lies above.
        top1_agreement: share of positions with the same most likely word.
        ppl: perplexity of the text.
        reference_ppl: perplexity with the reference.
    """

    num_tokens: int
    kld_mean: float
    kld_standard_error: float
    kld_median: float
    kld_p999: float
    top1_agreement: float
    ppl: float
    reference_ppl: float

    @property
    def ppl_change(self) -> float:
        """Relative change of the perplexity; above 0 is worse."""
        return self.ppl / self.reference_ppl - 1


class LogitComparison:
    """Compares two streams of logits, some positions at a time."""

    def __init__(self) -> None:
        # Plain floats: a small tensor that lives on between large short-lived ones keeps the allocator from using their
        # memory again (8 GB over 6000 tokens of 50,000 words).
        self._divergences: list[float] = []
        self._agreements: list[bool] = []
        self._losses: list[float] = []
        self._reference_losses: list[float] = []

    @property
    def kld_mean(self) -> float | None:
        """Nats a token so far; ``None`` before the first."""
        return sum(self._divergences) / len(self._divergences) if self._divergences else None

    def add(self, reference_logits: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Compare some positions.

        Args:
            reference_logits: ``[num_tokens, vocab_size]``, floats.
            logits: like ``reference_logits``.
            targets: int64 ``[num_tokens]``, the words that follow.

        Raises:
            ShapeError: sizes differ.
        """
        if logits.ndim != 2 or logits.shape != reference_logits.shape or targets.shape != logits.shape[:1]:
            raise ShapeError(
                f"LogitComparison.add: logits have shapes {list(reference_logits.shape)} and {list(logits.shape)}, "
                f"targets {list(targets.shape)}; give twice [num_tokens, vocab_size] and [num_tokens]."
            )
        parts = (torch.split(x, _ROWS) for x in (reference_logits, logits, targets))
        for reference_part, part, target in zip(*parts, strict=True):
            self._add_rows(reference_part.double().log_softmax(-1), part.double().log_softmax(-1), target)

    def result(self) -> LogitQuality:
        """Return the figures of all positions so far.

        Raises:
            ShapeError: there are none.
        """
        if not self._divergences:
            raise ShapeError("LogitComparison: no position was compared. Give more tokens, or skip fewer.")
        divergence = torch.tensor(self._divergences, dtype=torch.float64)
        num_tokens = len(divergence)
        deviation = float(divergence.std()) if num_tokens > 1 else 0.0
        return LogitQuality(
            num_tokens=num_tokens,
            kld_mean=float(divergence.mean()),
            kld_standard_error=deviation / math.sqrt(num_tokens),
            kld_median=float(divergence.median()),
            kld_p999=float(divergence.quantile(0.999)),
            top1_agreement=sum(self._agreements) / num_tokens,
            ppl=_perplexity(self._losses),
            reference_ppl=_perplexity(self._reference_losses),
        )

    def _add_rows(self, reference: Tensor, other: Tensor, target: Tensor) -> None:
        """Count rows of log-probabilities, float64 ``[rows, vocab_size]``."""
        self._agreements += (reference.argmax(-1) == other.argmax(-1)).tolist()
        for losses, log_probability in ((self._reference_losses, reference), (self._losses, other)):
            losses += (-log_probability.gather(1, target.unsqueeze(1)).squeeze(1)).tolist()
        # A word with no probability under p adds nothing, whatever q says of it.
        difference = (reference - other).masked_fill(reference == -torch.inf, 0.0)
        self._divergences += (reference.exp() * difference).sum(-1).tolist()


@dataclass(frozen=True)
class Needle:
    """A sentence to hide in a text, and what to ask for at its end.

    Attributes:
        sentence: states a fact that nothing else in the text tells.
        question: begins the same statement.
        answer: ends it.
    """

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What a model made of a needle's question.

    Attributes:
        is_found: the true answer was the most likely one, token by token.
        log_probability: of the true answer, in nats.
    """

    is_found: bool
    log_probability: float


@dataclass(frozen=True)
class Retrieval:
    """Needles that were found, paired with the reference: a small model may miss some by itself.

    Attributes:
        num_needles: how many were asked for.
        num_reference_found: found with the reference.
        num_found: found with the cache in question.
        num_lost: found with the reference alone.
        num_gained: found with the cache in question alone.
        log_probability_change: mean change of the true answer's log-probability, in nats; below 0 is worse.
    """

    num_needles: int
    num_reference_found: int
    num_found: int
    num_lost: int
    num_gained: int
    log_probability_change: float


def make_needles(num_needles: int, seed: int = 0) -> list[Needle]:
    """Return needles about different places, each with a word of its own.

    Words, because small models find them more often than numbers of several digits.

    Args:
        num_needles: at most ``MAX_NEEDLES``.
        seed: of which word belongs to which place.

    Raises:
        ConfigError: more needles than places.
    """
    if not 0 <= num_needles <= MAX_NEEDLES:
        raise ConfigError(f"make_needles: num_needles is {num_needles}; give 0 to {MAX_NEEDLES}.")
    words = random.Random(seed).sample(_WORDS, num_needles)
    needles = []
    for place, word in zip(_PLACES, words, strict=False):
        question = f"The secret word of {place} is"
        needles.append(Needle(f"\n\n{question} {word}. Remember it.\n\n", f"\n\n{question}", f" {word}"))
    return needles


def hide_needles(token_ids: Tensor, needles: Sequence[Tensor]) -> Tensor:
    """Put needles into a text at equal distances, the first and the last half a distance from its ends.

    Args:
        token_ids: int64 ``[num_tokens]``, the text.
        needles: int64 tokens of each needle's sentence.

    Returns:
        int64, as many tokens as all of these together.
    """
    if not needles:
        return token_ids
    cuts = [(2 * index + 1) * len(token_ids) // (2 * len(needles)) for index in range(len(needles))]
    parts = []
    for start, end, needle in zip([0, *cuts], cuts, needles, strict=False):
        parts += [token_ids[start:end], needle]
    return torch.cat([*parts, token_ids[cuts[-1] :]])


def score_answer(logits: Tensor, answer_ids: Tensor) -> Answer:
    """Judge the logits at the positions before each token of the true answer.

    Args:
        logits: ``[num_tokens, vocab_size]``.
        answer_ids: int64 ``[num_tokens]``.
    """
    log_probability = logits.double().log_softmax(-1).gather(1, answer_ids.unsqueeze(1)).sum()
    return Answer(bool((logits.argmax(-1) == answer_ids).all()), float(log_probability))


def pair_answers(reference: Sequence[Answer], answers: Sequence[Answer]) -> Retrieval:
    """Compare the answers to the same questions.

    Raises:
        ShapeError: there are not as many, or none.
    """
    if not reference or len(reference) != len(answers):
        raise ShapeError(
            f"pair_answers: {len(reference)} and {len(answers)} answers; give as many of both, at least 1."
        )
    pairs = list(zip(reference, answers, strict=True))
    return Retrieval(
        num_needles=len(pairs),
        num_reference_found=sum(old.is_found for old, _ in pairs),
        num_found=sum(new.is_found for _, new in pairs),
        num_lost=sum(old.is_found and not new.is_found for old, new in pairs),
        num_gained=sum(new.is_found and not old.is_found for old, new in pairs),
        log_probability_change=sum(new.log_probability - old.log_probability for old, new in pairs) / len(pairs),
    )


def _perplexity(losses: Sequence[float]) -> float:
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf
