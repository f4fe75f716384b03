"""A memory's division among weights, intermediate results and the key/value cache, and the tokens that follow.

    memory = weights + workspace of one pass + logits + maps of a calibrated cache + cache
    cache  = exact (float16) pages of every sequence + packed pages + a rest smaller than a page

The cache's part is that of ``kvcache.memory``, which the allocator follows to the byte.
"""

from dataclasses import dataclass

from kvcache import KVCacheConfig
from kvcache.memory import bytes_for_tokens, exact_bytes, max_tokens
from kvcache.page import PAGE_SIZE
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.errors import ConfigError
from moe_bitnet.units import format_bytes

CACHE_FORMATS = {"FP16": (16, 16), "K8V8": (8, 8), "K8V4": (8, 4), "K4V4": (4, 4), "K4V2": (4, 2), "K2V2": (2, 2)}
"""Bits of keys and values by name."""

_LOGIT_BYTES = 4


@dataclass(frozen=True)
class FormatPlan:
    """What one cache format holds.

    Attributes:
        format: a key of ``CACHE_FORMATS``.
        effective_bits: stored bits a cached element, scales included.
        bytes_per_token: of a token in a packed page, all layers together.
        num_tokens: of each sequence.
        multiple: tokens as a multiple of FP16's.
        cache_bytes: what the cache allocates for them.
    """

    format: str
    effective_bits: float
    bytes_per_token: float
    num_tokens: int
    multiple: float
    cache_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory goes.

    Attributes:
        memory_bytes: all of it.
        weight_bytes: weights.
        workspace_bytes: intermediate results of a pass (``ModelShape.workspace_bytes``).
        logit_bytes: float32 logits of every sequence's last token.
        frame_bytes: maps of a calibrated cache, 0 without calibration.
        exact_bytes: float16 sinks and windows, a part of every cache.
        cache_budget_bytes: what is left for the cache, its exact pages included.
        num_sequences: sequences of equal length.
        num_chunk_tokens: tokens of a pass.
        formats: by rising multiple.
    """

    memory_bytes: int
    weight_bytes: int
    workspace_bytes: int
    logit_bytes: int
    frame_bytes: int
    exact_bytes: int
    cache_budget_bytes: int
    num_sequences: int
    num_chunk_tokens: int
    formats: tuple[FormatPlan, ...]


def plan_memory(
    shape: ModelShape,
    memory_bytes: int,
    weight_bytes: int,
    num_sequences: int = 1,
    chunk_len: int = 512,
    is_calibrated: bool = False,
) -> MemoryPlan:
    """Divide a memory.

    Args:
        shape: the model's sizes.
        memory_bytes: for everything.
        weight_bytes: of the weights.
        num_sequences: sequences that are held at the same time.
        chunk_len: tokens of prefill that pass through the model together; at least one a sequence.
        is_calibrated: caches have maps made from data, which lie outside their budget.
    Raises:
        ConfigError: a number is below 1, or the memory does not even hold the exact pages beside the weights.
    """
    for name, number in (("--sequences", num_sequences), ("--chunk", chunk_len)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; give at least 1.")
    num_chunk_tokens = max(chunk_len, num_sequences)
    workspace_bytes = shape.workspace_bytes(num_chunk_tokens)
    logit_bytes = _LOGIT_BYTES * num_sequences * shape.vocab_size
    frame_bytes = shape.frame_bytes if is_calibrated else 0
    cache_budget_bytes = memory_bytes - weight_bytes - workspace_bytes - logit_bytes - frame_bytes
    exact = exact_bytes(cache_config(shape, "FP16"), num_sequences)
    if cache_budget_bytes < exact:
        raise ConfigError(
            f"memory is {format_bytes(memory_bytes)}, but weights take {format_bytes(weight_bytes)}, a pass of "
            f"{num_chunk_tokens} tokens {format_bytes(workspace_bytes)}, logits and maps "
            f"{format_bytes(logit_bytes + frame_bytes)}, float16 sinks and windows {format_bytes(exact)}. "
            f"Give more --memory, or lower --weights-bits, --chunk or --sequences."
        )
    return MemoryPlan(
        memory_bytes=memory_bytes,
        weight_bytes=weight_bytes,
        workspace_bytes=workspace_bytes,
        logit_bytes=logit_bytes,
        frame_bytes=frame_bytes,
        exact_bytes=exact,
        cache_budget_bytes=cache_budget_bytes,
        num_sequences=num_sequences,
        num_chunk_tokens=num_chunk_tokens,
        formats=tuple(_plan_format(shape, name, cache_budget_bytes, num_sequences) for name in CACHE_FORMATS),
    )


def cache_config(shape: ModelShape, format_name: str) -> KVCacheConfig:
    """Return the cache of a model in one of ``CACHE_FORMATS``.

    Raises:
        ConfigError: pages cannot hold heads of this size, or the model caches no keys and values of heads.
    """
    if shape.latent is not None:
        raise ConfigError(
            f"the model caches latent vectors of {shape.latent.cached_size} values (MLA), not keys and values of "
            f"heads, and pages cannot hold them. Supported are models such as LLaMA, Qwen3 and Mixtral."
        )
    key_bits, value_bits = CACHE_FORMATS[format_name]
    return KVCacheConfig(shape.num_layers, shape.num_kv_heads, shape.head_dim, key_bits, value_bits)


def _plan_format(shape: ModelShape, name: str, budget_bytes: int, num_sequences: int) -> FormatPlan:
    config = cache_config(shape, name)
    num_tokens = max_tokens(config, budget_bytes, num_sequences)
    fp16_tokens = max_tokens(cache_config(shape, "FP16"), budget_bytes, num_sequences)
    return FormatPlan(
        format=name,
        effective_bits=config.effective_bits,
        bytes_per_token=config.page_bytes / PAGE_SIZE,
        num_tokens=num_tokens,
        multiple=num_tokens / fp16_tokens,
        cache_bytes=bytes_for_tokens(config, num_tokens, num_sequences),
    )
