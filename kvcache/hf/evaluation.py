"""Run a model of transformers over a text with several caches side by side, and compare what it says.

In: a model, tokens, a reference cache and others; any ``Cache`` of transformers will do. Out: ``LogitQuality`` and
``Retrieval`` of ``kvcache/quality.py``.

The text passes in chunks of at most a page, on the grid of pages. So each token sees the very pages, quantized or not,
that it would see in decoding: a page is sealed between two chunks, never within one. All caches take their turn at each
chunk; logits are compared at once and never stored, so memory does not grow with the text but for the caches.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcache.config import SUPPORTED_BITS, KVCacheConfig
from kvcache.hf.cache import HFPagedCache, paged_cache
from kvcache.hf.calibrate import cache_argument
from kvcache.hf.support import attention_shape
from kvcache.memory import bytes_for_tokens
from kvcache.moments import Moments
from kvcache.page import PAGE_SIZE
from kvcache.quality import (
    Answer,
    LogitComparison,
    LogitQuality,
    Needle,
    Retrieval,
    hide_needles,
    pair_answers,
    score_answer,
)
from moe_bitnet.errors import ConfigError, ShapeError

# A fork of the cache answers a needle's question, so there are two sequences at a time.
_NUM_SEQUENCES = 2
_FORMAT = re.compile(r"K(\d+)V(\d+)", re.IGNORECASE)

Tokenize = Callable[[str], Tensor]
"""Text to int64 ``[num_tokens]``, without special tokens."""

Progress = Callable[[int, Mapping[str, LogitComparison]], None]
"""Called with the number of tokens done and the comparisons so far."""


@dataclass(frozen=True)
class CacheFormat:
    """Bits of keys and values.

    Attributes:
        key_bits: 16, 8, 4 or 2.
        value_bits: 16, 8, 4 or 2.
    """

    key_bits: int
    value_bits: int

    def __str__(self) -> str:
        return f"K{self.key_bits}V{self.value_bits}"


@dataclass(frozen=True)
class TokenizedNeedle:
    """A needle's texts as int64 tokens; see ``kvcache.quality.Needle``."""

    sentence_ids: Tensor
    question_ids: Tensor
    answer_ids: Tensor


@dataclass(frozen=True)
class CacheQuality:
    """What a cache does to a model.

    Attributes:
        logits: comparison of the text's logits with the reference's.
        retrieval: needles at the end of the text; ``None`` if there were none.
    """

    logits: LogitQuality
    retrieval: Retrieval | None


def tokenize_needles(needles: Sequence[Needle], tokenize: Tokenize) -> list[TokenizedNeedle]:
    """Tokenize each part of each needle by itself."""
    return [
        TokenizedNeedle(tokenize(needle.sentence), tokenize(needle.question), tokenize(needle.answer))
        for needle in needles
    ]


def text_with_needles(text_ids: Tensor, needles: Sequence[TokenizedNeedle], num_tokens: int) -> Tensor:
    """Hide needles in the beginning of a text so that all together are ``num_tokens``.

    Raises:
        ShapeError: the text is too short, or needles alone are longer.
    """
    num_text_tokens = num_tokens - sum(len(needle.sentence_ids) for needle in needles)
    if not len(needles) <= num_text_tokens <= len(text_ids):
        raise ShapeError(
            f"the text has {len(text_ids)} tokens; {num_tokens} with {len(needles)} needles take {num_text_tokens} of "
            f"it. Give more text, or other numbers."
        )
    return hide_needles(text_ids[:num_text_tokens], [needle.sentence_ids for needle in needles])


def evaluate_caches(
    model: Any,
    token_ids: Tensor,
    needles: Sequence[TokenizedNeedle],
    reference: Any,
    others: Mapping[str, Any],
    *,
    chunk_len: int = PAGE_SIZE,
    num_skipped: int = 0,
    on_chunk: Progress | None = None,
) -> dict[str, CacheQuality]:
    """Compare the logits over a text, then ask for the needles in it.

    Args:
        model: as of ``compare_caches``, like all that is not named here.
        token_ids: what ``text_with_needles`` returned.
        needles: those hidden there.
        reference: an empty cache.
        others: empty caches by name.
        chunk_len: tokens of a forward pass.
        num_skipped: first positions that are not compared.
        on_chunk: hears of progress.
    """
    comparisons = compare_caches(
        model, token_ids, reference, others, chunk_len=chunk_len, num_skipped=num_skipped, on_chunk=on_chunk
    )
    expected = [ask(model, reference, needle) for needle in needles]
    return {
        name: CacheQuality(
            comparisons[name].result(),
            pair_answers(expected, [ask(model, cache, needle) for needle in needles]) if needles else None,
        )
        for name, cache in others.items()
    }


def parse_format(text: str) -> CacheFormat:
    """Read a format such as ``K8V4``.

    Raises:
        ConfigError: it is no such text, or there is no such width.
    """
    match = _FORMAT.fullmatch(text.strip())
    bits = [int(part) for part in match.groups()] if match else []
    if not bits or not set(bits) <= set(SUPPORTED_BITS):
        raise ConfigError(f"cache format is {text!r}; write it like K8V4, with 16, 8, 4 or 2 bits for each.")
    return CacheFormat(*bits)


def make_cache(model: Any, cache_format: CacheFormat, max_tokens: int, calibration: Moments | None) -> HFPagedCache:
    """Make a cache that holds ``max_tokens`` tokens, and a fork of them.

    Args:
        model: as of ``paged_cache``.
        cache_format: bits.
        max_tokens: tokens of the text, questions included.
        calibration: moments of this model, or ``None``.
    """
    config = cache_config(model, cache_format)
    return paged_cache(
        model,
        bytes_for_tokens(config, max_tokens, _NUM_SEQUENCES),
        key_bits=cache_format.key_bits,
        value_bits=cache_format.value_bits,
        calibration=calibration,
        batch_size=_NUM_SEQUENCES,
    )


def cache_config(model: Any, cache_format: CacheFormat) -> KVCacheConfig:
    """Return the sizes and bits of the cache that ``make_cache`` makes."""
    shape = attention_shape(model)
    return KVCacheConfig(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, cache_format.key_bits, cache_format.value_bits
    )


@torch.inference_mode()
def compare_caches(
    model: Any,
    token_ids: Tensor,
    reference: Any,
    others: Mapping[str, Any],
    *,
    chunk_len: int = PAGE_SIZE,
    num_skipped: int = 0,
    on_chunk: Progress | None = None,
) -> dict[str, LogitComparison]:
    """Feed a text to the model with every cache, and compare the logits with those of the reference.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        token_ids: int64 ``[num_tokens]``; all but the last enter the caches.
        reference: an empty cache, left holding ``num_tokens - 1`` tokens.
        others: empty caches by name, likewise.
        chunk_len: tokens of a forward pass; divides 64.
        num_skipped: first positions that are not compared; the earliest ones see no quantized page.
        on_chunk: called with the number of tokens done and the comparisons so far.

    Raises:
        ConfigError: ``chunk_len`` does not divide a page.
        ShapeError: no position is left to compare.
    """
    if chunk_len < 1 or PAGE_SIZE % chunk_len:
        raise ConfigError(f"compare_caches: chunk_len is {chunk_len}; give 1, 2, 4, 8, 16, 32 or 64, within a page.")
    num_inputs = len(token_ids) - 1
    if token_ids.ndim != 1 or not 0 <= num_skipped < num_inputs:
        raise ShapeError(
            f"compare_caches: token_ids has shape {list(token_ids.shape)} and {num_skipped} positions are skipped; "
            f"give [num_tokens], more than are skipped."
        )
    comparisons = {name: LogitComparison() for name in others}
    for start in range(0, num_inputs, chunk_len):
        end = min(start + chunk_len, num_inputs)
        chunk, targets = token_ids[start:end], token_ids[start + 1 : end + 1]
        first = min(max(num_skipped - start, 0), end - start)
        expected = forward(model, chunk, reference)[first:]
        for name, cache in others.items():
            logits = forward(model, chunk, cache)[first:]
            if len(logits):
                comparisons[name].add(expected, logits, targets[first:].to(logits.device))
        if on_chunk is not None:
            on_chunk(end, comparisons)
    return comparisons


@torch.inference_mode()
def ask(model: Any, cache: Any, needle: TokenizedNeedle) -> Answer:
    """Ask for a needle at the end of what a cache holds; the cache stays as it is.

    The true answer is fed as well: the model must predict each of its tokens after the true ones before.
    """
    fork = _fork(cache)
    question_and_answer = torch.cat((needle.question_ids, needle.answer_ids[:-1]))
    logits = forward(model, question_and_answer, fork, num_logits=len(needle.answer_ids))
    if isinstance(fork, HFPagedCache):
        fork.reset()  # gives its pages back
    return score_answer(logits, needle.answer_ids.to(logits.device))


def _fork(cache: Any) -> Any:
    """Return a cache that can grow by itself.

    The layers of transformers' own growing caches replace their tensors and never write into them, so that copies may
    share them; tensors of quantization libraries often cannot be copied deeply.
    """
    if isinstance(cache, HFPagedCache):
        return cache.fork()
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def forward(model: Any, token_ids: Tensor, cache: Any, num_logits: int = 0) -> Tensor:
    """Return the logits ``[num_logits, vocab_size]`` of the last of some tokens, or of all (0), through a cache."""
    arguments = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": num_logits}
    logits: Tensor = model(token_ids.unsqueeze(0).to(model.device), **arguments).logits
    return logits[0]
