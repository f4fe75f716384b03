"""Settings of the KV cache, checked once, and the bytes that follow from them."""

from dataclasses import dataclass

from kvcache.page import (
    FP16_BYTES,
    PAGE_SIZE,
    LayerFormat,
    PageFormat,
    key_plane_format,
    value_plane_format,
)
from moe_bitnet.errors import ConfigError

SUPPORTED_BITS = (16, 8, 4, 2)


@dataclass(frozen=True)
class KVCacheConfig:
    """Sizes of the model's attention and the storage format of its keys and values.

    A plain float16 cache is ``key_bits=value_bits=16``: the same class, pages and code path, so that comparisons
    between formats measure the format alone.

    Attributes:
        num_layers: L, layers that keep keys and values.
        num_kv_heads: G, key/value heads per layer.
        head_dim: D, elements per head; a multiple of 16.
        key_bits: 16, 8, 4 or 2.
        value_bits: 16, 8, 4 or 2.
        layer_bits: ``(layer_index, key_bits, value_bits)`` of layers that differ from the rest.
        num_sink_tokens: first tokens of a sequence, kept in float16 for good; a multiple of 64.
        num_window_tokens: the most recent tokens that are in float16 at any time; up to 63 older ones wait beside them
            until they fill a page.

    Raises:
        ConfigError: a size or combination that cannot work; the message names the field and the way out.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    key_bits: int = 8
    value_bits: int = 8
    layer_bits: tuple[tuple[int, int, int], ...] = ()
    num_sink_tokens: int = 64
    num_window_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("num_sink_tokens", "num_window_tokens"):
            _check_at_least(name, getattr(self, name), 0)
        if self.num_sink_tokens % PAGE_SIZE:
            raise ConfigError(
                f"KVCacheConfig: num_sink_tokens is {self.num_sink_tokens}; give a multiple of {PAGE_SIZE}, one page."
            )
        _check_bits("key_bits", self.key_bits)
        _check_bits("value_bits", self.value_bits)
        for layer_index, key_bits, value_bits in self.layer_bits:
            if not 0 <= layer_index < self.num_layers:
                raise ConfigError(
                    f"KVCacheConfig: layer_bits names layer {layer_index}; there are layers 0 to {self.num_layers - 1}."
                )
            _check_bits("key bits in layer_bits", key_bits)
            _check_bits("value bits in layer_bits", value_bits)
        if len({layer_index for layer_index, _, _ in self.layer_bits}) < len(self.layer_bits):
            raise ConfigError(f"KVCacheConfig: layer_bits names a layer twice: {self.layer_bits}.")
        self.page_format(is_calibrated=False)  # refuses a head_dim that does not fill whole words

    def bits_of_layer(self, layer_index: int) -> tuple[int, int]:
        """Return a layer's key bits and value bits."""
        for index, key_bits, value_bits in self.layer_bits:
            if index == layer_index:
                return key_bits, value_bits
        return self.key_bits, self.value_bits

    def page_format(self, is_calibrated: bool) -> PageFormat:
        """Return where the bytes of a packed page lie; its size does not depend on calibration.

        Args:
            is_calibrated: keys are sorted by importance (``calibration.py``) and cut into segments.
        """
        layers = (self.bits_of_layer(layer_index) for layer_index in range(self.num_layers))
        return PageFormat(tuple(self._layer_format(*bits, is_calibrated) for bits in layers))

    @property
    def exact_page_format(self) -> PageFormat:
        """Where the bytes of a float16 page lie."""
        return PageFormat((self._layer_format(16, 16, False),) * self.num_layers)

    @property
    def page_bytes(self) -> int:
        """Bytes of a packed page: 64 tokens of all layers, keys and values, scales included."""
        return self.page_format(is_calibrated=False).page_bytes

    @property
    def exact_page_bytes(self) -> int:
        """Bytes of a float16 page."""
        return PAGE_SIZE * self.fp16_bytes_per_token

    @property
    def effective_bits(self) -> float:
        """Stored bits per element of a packed page, scales included, averaged over layers, keys and values."""
        return 16 * self.page_bytes / self.exact_page_bytes

    @property
    def fp16_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in float16, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * FP16_BYTES

    @property
    def max_tail_tokens(self) -> int:
        """Most tokens behind the sealed pages: the window and a page that is not full yet."""
        return self.num_window_tokens + PAGE_SIZE - 1

    @property
    def exact_pages_per_sequence(self) -> int:
        """Float16 pages that a sequence needs at most: sinks, tail, and one that layers are sealing."""
        return self.num_sink_tokens // PAGE_SIZE + -(-self.max_tail_tokens // PAGE_SIZE) + 1

    def _layer_format(self, key_bits: int, value_bits: int, is_calibrated: bool) -> LayerFormat:
        return LayerFormat(
            self.num_kv_heads,
            key_plane_format(key_bits, self.head_dim, is_calibrated),
            value_plane_format(value_bits, self.head_dim),
        )


def _check_at_least(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"KVCacheConfig: {name} is {value!r}; give an integer of at least {minimum}.")


def _check_bits(name: str, value: object) -> None:
    if value not in SUPPORTED_BITS or isinstance(value, bool):
        raise ConfigError(f"KVCacheConfig: {name} is {value!r}; use 16 (float16), 8, 4 or 2.")
