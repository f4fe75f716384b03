"""Texts, perplexities and continued training for ``benchmarks.upcycling``, apart from what it reports.

Training text is half code, half prose, in every batch; both kinds keep documents of their own for validation.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.bare_loop import bare_loop
from cluster.training.batches import Batch, TokenBatches, validation_batches
from cluster.training.config import TrainConfig
from cluster.training.document import Document
from cluster.training.engine import TorchEngine
from cluster.training.shards import split_documents
from cluster.training.token_array import Tokens
from moe_bitnet.checkpoint.native import is_matrix
from moe_bitnet.evaluation import perplexity, token_losses
from moe_bitnet.model import MoETransformer
from moe_bitnet.quantization import quantize_weight
from moe_bitnet.tokenizer import Tokenizer

_UNUSED = Path("unused")  # the settings of a run name folders; nothing is read or written here

Perplexities = Mapping[str, float]
"""By kind of text."""


@dataclass(frozen=True)
class Text:
    """One kind of text as tokens.

    Attributes:
        train: int32 ``[num_tokens]``.
        validation: int64 ``[num_windows, seq_len + 1]``, spread evenly over other documents.
    """

    train: Tokens
    validation: Tensor


@dataclass(frozen=True)
class Course:
    """How far training goes on.

    Attributes:
        num_steps: of the learning rate's schedule.
        batch_size: sequences a step, a multiple of the kinds of text.
        seq_len: tokens of a sequence.
        peak_learning_rate: of the schedule.
        num_points: evaluations on the way, the last one included.
        max_s: seconds after which training stops, evaluations included.
        has_frozen_backbone: train routed experts and routers alone.
    """

    num_steps: int
    batch_size: int
    seq_len: int
    peak_learning_rate: float
    num_points: int
    max_s: float
    has_frozen_backbone: bool


@dataclass(frozen=True)
class Point:
    """Where training was.

    Attributes:
        step: updates so far.
        num_tokens: seen so far.
        perplexities: by kind of text.
        train_s: seconds so far, without evaluations.
        largest_load: visits of a layer's busiest expert over the mean of its experts, of the worst layer, over the
            steps since the last point; 1 is perfect balance.
    """

    step: int
    num_tokens: int
    perplexities: Perplexities
    train_s: float
    largest_load: float


def make_text(documents: Sequence[Document], tokenizer: Tokenizer, seq_len: int, num_windows: int) -> Text:
    """Divide documents into training and validation, and tokenize them; an end of text closes each."""
    train, validation = (_tokenize(side, tokenizer) for side in split_documents(documents))
    windows = validation_batches(validation, 1, seq_len, num_windows)
    rows = [np.concatenate((inputs[0], targets[0, -1:])) for inputs, targets in windows]
    return Text(train, torch.from_numpy(np.stack(rows)))


def measure(model: MoETransformer, texts: Mapping[str, Text]) -> dict[str, float]:
    """Return the perplexity on each kind of text, computed in float32 on windows that start without a past."""
    return {
        name: perplexity(torch.cat([token_losses(model, window) for window in text.validation]))
        for name, text in texts.items()
    }


@torch.no_grad()
def rounded(dense: MoETransformer) -> MoETransformer:
    """Return a copy of the dense model with every projection rounded to ternary, and nothing else done for it."""
    model = copy.deepcopy(dense)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight") or (".shared_experts." in name and is_matrix(name)):
            integers, scale = quantize_weight(parameter)
            parameter.copy_((integers * scale).view_as(parameter))
    return model


def train_on(
    model: MoETransformer, texts: Mapping[str, Text], course: Course, on_point: Callable[[Point], None]
) -> Point:
    """Go on training, in bfloat16 with float32 parameters.

    Args:
        model: changes in place.
        texts: each gives the same share of every batch.
        course: how far.
        on_point: takes each evaluation as soon as it is there.
    Returns:
        the last evaluation.
    Raises:
        TrainingError: the loss jumped, or it or a gradient is not finite.
    """
    config = TrainConfig(
        data_folder=_UNUSED,
        out_folder=_UNUSED,
        num_steps=course.num_steps,
        batch_size=course.batch_size,
        seq_len=course.seq_len,
        has_frozen_backbone=course.has_frozen_backbone,
    )
    share = course.batch_size // len(texts)
    sources = [TokenBatches(text.train, share, course.seq_len) for text in texts.values()]

    def mixed_batch(step: int) -> Batch:
        inputs, targets = zip(*(source.at(step) for source in sources), strict=True)
        return np.concatenate(inputs), np.concatenate(targets)

    loop = bare_loop(TorchEngine(model, config), config, course.peak_learning_rate, mixed_batch)
    visits = torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.float64)
    start, train_s = time.monotonic(), 0.0
    for step in range(course.num_steps):
        lap = time.monotonic()
        visits += loop.step(step).tokens_per_expert
        train_s += time.monotonic() - lap
        num_done, is_late = step + 1, time.monotonic() - start > course.max_s
        if is_late or num_done in evaluated_steps(course):
            load = visits.max(1).values / visits.mean(1)
            num_tokens = num_done * course.batch_size * course.seq_len
            point = Point(num_done, num_tokens, measure(model, texts), train_s, float(load.max()))
            on_point(point)
            visits.zero_()
        if is_late:
            break
    return point


def evaluated_steps(course: Course) -> set[int]:
    """Return the steps after which perplexities are taken, the last step included."""
    return {round(course.num_steps * index / course.num_points) for index in range(1, course.num_points + 1)}


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return np.array([token for ids in encoded for token in (*ids, tokenizer.end_of_text_id)], dtype=np.int32)
