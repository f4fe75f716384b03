"""Text from one model in this process, timed: through the fused decoder where it can be, else with a cache.

The fused decoder takes packed checkpoints and keeps keys and values in float16. Float checkpoints, those with a float
backbone, and caches of 8 and 4 bits, run module by module.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kvcache import KVCacheConfig, QuantizedKVCache
from kvcache.memory import bytes_for_tokens
from moe_bitnet.attention import AttentionCache
from moe_bitnet.checkpoint.native import load_model, read_info
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.errors import BackendError, ConfigError
from moe_bitnet.generation import generate
from moe_bitnet.kernels import registry
from moe_bitnet.kernels.backend_cpp import instruction_set
from moe_bitnet.kernels.registry import BACKEND_VARIABLE
from moe_bitnet.model import MoETransformer
from moe_bitnet.table import TableFormat
from moe_bitnet.units import format_bytes

DECODER_KV_BITS = 16


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_new_tokens: tokens to add at most.
        temperature: 0 is greedy.
        seed: of the sampling.
        kv_bits: bits of the key/value cache, 16, 8 or 4.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    kv_bits: int


@dataclass(frozen=True)
class TimedText:
    """New tokens and how long they took.

    Attributes:
        token_ids: the new tokens.
        prompt_s: seconds until the first of them was known.
        decode_s: seconds from then to the last.
    """

    token_ids: list[int]
    prompt_s: float
    decode_s: float

    @property
    def seconds(self) -> float:
        """Seconds of all tokens."""
        return self.prompt_s + self.decode_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second after the first; ``None`` if there is no other."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 else None


@dataclass(frozen=True)
class LocalText:
    """What :func:`generate_alone` gives.

    Attributes:
        text: the new tokens, timed.
        backend: what computed, such as ``"cpp avx512"``, or ``"torch"`` for float and latent weights.
        weight_bytes: of all weights in memory.
    """

    text: TimedText
    backend: str
    weight_bytes: int


def generate_alone(checkpoint: Path, request: Request, head: TableFormat | None = None) -> LocalText:
    """Load a checkpoint and generate with it in this process.

    Args:
        checkpoint: its folder.
        request: what to generate.
        head: format of embedding and head, for the fused decoder alone; ``None`` leaves them in float32.
    Raises:
        ConfigError: ``head`` is given where the fused decoder is not used.
        CheckpointError: the checkpoint is missing or damaged.
    """
    info = read_info(checkpoint)
    is_packed = info.layout is not None and not info.config.has_float_backbone
    is_fused = is_packed and request.kv_bits == DECODER_KV_BITS
    if head is not None and not is_fused:
        raise ConfigError(
            f"--head {head} needs a packed checkpoint and --kv-bits {DECODER_KV_BITS}; {checkpoint} is "
            f"{'packed' if is_packed else 'not packed throughout'}, --kv-bits is {request.kv_bits}. Give both, or no "
            f"--head."
        )
    model = load_model(checkpoint)
    result = _generate_fused(model, request, head) if is_fused else None
    if result is None:
        text = generate_with_cache(model, request)
        result = LocalText(text, _backend_name(model), _num_bytes(model))
    _report(result, len(request.prompt_ids))
    return result


def generate_with_cache(model: MoETransformer, request: Request) -> TimedText:
    """Generate with a paged cache of the request's bits, its experts wherever they are."""
    config = model.config
    cache_config = KVCacheConfig(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        key_bits=request.kv_bits,
        value_bits=request.kv_bits,
    )
    budget_bytes = bytes_for_tokens(cache_config, len(request.prompt_ids) + request.max_new_tokens)
    return _timed(model, request, QuantizedKVCache(cache_config, budget_bytes))


def _generate_fused(model: MoETransformer, request: Request, head: TableFormat | None) -> LocalText | None:
    """Generate with the fused decoder; ``None``, said aloud, if its library is not there and ``head`` not given."""
    wanted = os.environ.get(BACKEND_VARIABLE)
    try:
        if wanted not in (None, "", "cpp"):
            raise BackendError(f"{BACKEND_VARIABLE} is {wanted!r}; the fused decoder is part of 'cpp'.")
        decoder = PackedDecoder(model, len(request.prompt_ids) + request.max_new_tokens, head or "float32")
    except BackendError as error:
        if head is not None:
            raise
        say(f"without the fused decoder: {error}")
        return None
    return LocalText(_timed(decoder, request), f"cpp {instruction_set()}", decoder.weight_bytes)


def _timed(model: MoETransformer | PackedDecoder, request: Request, cache: AttentionCache | None = None) -> TimedText:
    with progress_bar("generate", request.max_new_tokens) as bar:
        clock = _TokenClock(bar.update)
        token_ids = generate(
            model,
            request.prompt_ids,
            request.max_new_tokens,
            cache,
            temperature=request.temperature,
            seed=request.seed,
            on_token=clock.on_token,
        )
    return TimedText(token_ids, clock.first_s - clock.start_s, clock.last_s - clock.first_s)


class _TokenClock:
    """Notes when the first and the last token came."""

    def __init__(self, on_count: Callable[[int], None]) -> None:
        self._on_count = on_count
        self._num_tokens = 0
        self.start_s = self.first_s = self.last_s = time.perf_counter()

    def on_token(self, _: int) -> None:
        self.last_s = time.perf_counter()
        if self._num_tokens == 0:
            self.first_s = self.last_s
        self._num_tokens += 1
        self._on_count(self._num_tokens)


def _backend_name(model: MoETransformer) -> str:
    """Return what computes the ternary products of a model."""
    if model_layout(model) is None:
        return "torch"
    chosen = registry().select("ternary_linear")
    name = next(each.name for each in registry().backends if each.operations.get("ternary_linear") is chosen)
    return f"cpp {instruction_set()}" if name == "cpp" else name


def _num_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def _report(result: LocalText, num_prompt_tokens: int) -> None:
    text = result.text
    decoding = text.decode_tokens_per_s
    rates = f"prompt {num_prompt_tokens / text.prompt_s:.1f} tok/s"
    if decoding is not None:
        rates += f"  decoding {decoding:.1f} tok/s"
    say(f"{rates}  weights {format_bytes(result.weight_bytes)}  {result.backend}")
