"""Settings of the KV cache, checked once, and the bytes that follow from them."""

from dataclasses import dataclass

from kvcache.page import FP16_BYTES, PageFormat, PlaneFormat
from moe_bitnet.errors import ConfigError

SUPPORTED_BITS = (16, 8, 4)


@dataclass(frozen=True)
class KVCacheConfig:
    """Sizes of the model's attention and the storage format of its keys and values.

    A plain float16 cache is ``key_bits=value_bits=16``: the same class, pages and code path, so that comparisons
    between formats measure the format alone.

    Attributes:
        num_layers: L, layers that append to the cache.
        num_kv_heads: G, key/value heads per layer.
        head_dim: D, elements per head; a power of two where a rotated format is used, even at 4 bits.
        key_bits: 16, 8 or 4.
        value_bits: 16, 8 or 4.
        page_size: P, tokens that are quantized together, once.
        num_sink_tokens: first tokens of the sequence, kept in float16 for good.
        num_window_tokens: most recent tokens that are in float16 at any time, at least 1; up to ``page_size - 1``
            older ones wait beside them until they fill a page. A chunk of at most this many tokens attends to its
            own tokens unquantized.
        group_size: channels that share a scale at 4 bits; a smaller ``head_dim`` is one group.
        is_rotated: quantize the Walsh-Hadamard transform of keys and values instead of themselves. Says nothing
            about 16-bit planes, which are never rotated.

    Raises:
        ConfigError: a size or combination that cannot work; the message names the field and the way out.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    key_bits: int = 8
    value_bits: int = 8
    page_size: int = 64
    num_sink_tokens: int = 32
    num_window_tokens: int = 64
    group_size: int = 32
    is_rotated: bool = True

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size", "num_window_tokens", "group_size"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("num_sink_tokens", self.num_sink_tokens, 0)
        for name in ("key_bits", "value_bits"):
            _check_at_least(name, getattr(self, name), min(SUPPORTED_BITS))
            if getattr(self, name) not in SUPPORTED_BITS:
                raise ConfigError(f"KVCacheConfig: {name} is {getattr(self, name)!r}; use 16 (float16), 8 or 4.")
        lowest_bits = min(self.key_bits, self.value_bits)
        if lowest_bits == 4 and (self.head_dim % 2 or self.head_dim % self.channels_per_scale):
            raise ConfigError(
                f"KVCacheConfig: 4 bits need an even head_dim that group_size divides; head_dim is {self.head_dim}, "
                f"group_size {self.group_size}. Choose another group_size, or 8 or 16 bits."
            )
        if self.is_rotated and lowest_bits < 16 and self.head_dim.bit_count() != 1:
            raise ConfigError(
                f"KVCacheConfig: the Walsh-Hadamard rotation needs head_dim to be a power of two, not "
                f"{self.head_dim}. Switch it off with is_rotated=False, or store 16 bits."
            )

    @property
    def channels_per_scale(self) -> int:
        """Channels of a 4-bit group: ``group_size``, or ``head_dim`` if that is smaller."""
        return min(self.group_size, self.head_dim)

    @property
    def page_format(self) -> PageFormat:
        """Where the bytes of a page lie."""
        return PageFormat(key=self._plane_format(self.key_bits), value=self._plane_format(self.value_bits))

    @property
    def page_bytes(self) -> int:
        """Bytes of one sealed page (``page_size`` tokens of one layer, keys and values), scales included."""
        return self.page_format.page_bytes

    @property
    def effective_bits(self) -> float:
        """Stored bits per element of a sealed page, scales included, averaged over keys and values."""
        return 8 * self.page_bytes / (2 * self.page_format.key.num_elements)

    @property
    def fp16_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in float16, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * FP16_BYTES

    @property
    def max_recent_tokens(self) -> int:
        """Tokens per layer that can be in float16 at once: sinks, window and the page that is filling up."""
        return self.num_sink_tokens + self.num_window_tokens + self.page_size - 1

    @property
    def recent_bytes(self) -> int:
        """Bytes of the float16 region of all layers, which a cache allocates whatever its length."""
        return self.max_recent_tokens * self.fp16_bytes_per_token

    def _plane_format(self, num_bits: int) -> PlaneFormat:
        return PlaneFormat(
            num_bits=num_bits,
            num_kv_heads=self.num_kv_heads,
            page_size=self.page_size,
            head_dim=self.head_dim,
            group_size=self.channels_per_scale,
            is_rotated=self.is_rotated and num_bits < 16,
        )


def _check_at_least(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"KVCacheConfig: {name} is {value!r}; give an integer of at least {minimum}.")
