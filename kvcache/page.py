"""Where each byte of a page lies: pure arithmetic, no codes are read or written here.

A page holds ``PAGE_SIZE`` consecutive tokens of one sequence, for all layers and KV heads. *Exact* pages hold float16;
a *packed* page holds the codes of the same tokens. With D head_dim, G num_kv_heads, b bits:

    page   | layer 0 | layer 1 | ...                                     widths may differ from layer to layer
    layer  | head 0 | head 1 | ... | head G - 1 |
    head   | key plane | value plane |                                   each a multiple of 64 bytes

    plane of 8, 4 or 2 bits   | codes: 8 * D * b bytes | scale codes: u8 [64], one per token |
      key codes     u32 [4 tiles of 16 tokens][D * b / 32 words][16 tokens]          a lane is a token
      value codes   u32 [D / 16 tiles of 16 channels][2 * b words][16 channels]      a lane is a channel
    plane of 16 bits          key f16 [D][64], value f16 [64][D]

The words of a lane are a little-endian bit stream: for keys along the channels of a token, for values along the 64
tokens of a channel. So a vector of 16 lanes multiplies without any sum across lanes. A key stream may be cut into
*segments* of different bits: ``frame.py`` sorts the channels by how much they matter.
"""

from dataclasses import dataclass

from moe_bitnet.errors import ConfigError

PAGE_SIZE = 64
LANES = 16
FP16_BYTES = 2
WORD_BITS = 32


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a stream with one width.

    Attributes:
        num_elements: channels (keys) or tokens (values).
        num_bits: 8 (plain int8), or 4, 2, 1 (trellis code).
    """

    num_elements: int
    num_bits: int

    @property
    def num_words(self) -> int:
        """32-bit words of the segment in one lane."""
        return self.num_elements * self.num_bits // WORD_BITS


@dataclass(frozen=True)
class PlaneFormat:
    """The keys or the values of one head in one page.

    Attributes:
        num_bits: 16, 8, 4 or 2, on average over the channels.
        head_dim: D.
        segments: how the stream of a lane is cut; empty at 16 bits.
    """

    num_bits: int
    head_dim: int
    segments: tuple[Segment, ...]

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale codes."""
        return 0 if self.num_bits == 16 else PAGE_SIZE

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, or of the float16 elements."""
        return PAGE_SIZE * self.head_dim * self.num_bits // 8

    @property
    def plane_bytes(self) -> int:
        """Bytes of the plane, scales included."""
        return self.code_bytes + self.scale_bytes

    @property
    def effective_bits(self) -> float:
        """Stored bits per element, everything included."""
        return 8 * self.plane_bytes / (PAGE_SIZE * self.head_dim)


@dataclass(frozen=True)
class LayerFormat:
    """One layer's part of a page.

    Attributes:
        num_kv_heads: G.
        key: format of every head's keys.
        value: format of every head's values.
    """

    num_kv_heads: int
    key: PlaneFormat
    value: PlaneFormat

    @property
    def head_dim(self) -> int:
        """D."""
        return self.key.head_dim

    @property
    def head_bytes(self) -> int:
        """Bytes of one head: its key plane, then its value plane."""
        return self.key.plane_bytes + self.value.plane_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of all heads."""
        return self.num_kv_heads * self.head_bytes

    @property
    def exact_layer_bytes(self) -> int:
        """Bytes of the layer in an exact page: float16 keys and values of all heads."""
        return 2 * self.num_kv_heads * PAGE_SIZE * self.head_dim * FP16_BYTES


@dataclass(frozen=True)
class PageFormat:
    """All layers of a page.

    Attributes:
        layers: one format a layer, in the order of the bytes.
    """

    layers: tuple[LayerFormat, ...]

    def layer_offset(self, layer_index: int) -> int:
        """Return the first byte of a layer within the page."""
        return sum(layer.layer_bytes for layer in self.layers[:layer_index])

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.layer_offset(len(self.layers))


def key_plane_format(num_bits: int, head_dim: int, is_calibrated: bool) -> PlaneFormat:
    """Return the format of a head's keys: 16 bits, one segment, or segments for channels sorted by importance.

    Raises:
        ConfigError: the widths do not fill whole words.
    """
    return _checked(PlaneFormat(num_bits, head_dim, _key_segments(num_bits, head_dim, is_calibrated)))


def value_plane_format(num_bits: int, head_dim: int) -> PlaneFormat:
    """Return the format of a head's values."""
    segments = () if num_bits == 16 else (Segment(PAGE_SIZE, num_bits),)
    return _checked(PlaneFormat(num_bits, head_dim, segments))


def _key_segments(num_bits: int, head_dim: int, is_calibrated: bool) -> tuple[Segment, ...]:
    """Cut the channels; the widths average ``num_bits``.

    On post-RoPE keys of SmolLM2, wide segments for the channels that matter most lowered the divergence by 38 % at 4
    bits and 13 % at 2 (docs/experiments.md): about an eighth at 8 bits and a quarter at 2, or a quarter at 4 and a
    half at 1. There are twice as many narrow channels as wide ones.
    """
    if num_bits == 16:
        return ()
    wide, narrow, share, unit = {8: (8, 8, head_dim, 16), 4: (8, 2, 8, 8), 2: (4, 1, 4, 16)}[num_bits]
    num_wide = head_dim // share // unit * unit
    if not is_calibrated or num_wide == 0:
        return (Segment(head_dim, num_bits),)
    rest = Segment(head_dim - 3 * num_wide, num_bits)
    return (Segment(num_wide, wide), rest, Segment(2 * num_wide, narrow))


def _checked(plane_format: PlaneFormat) -> PlaneFormat:
    head_dim = plane_format.head_dim
    is_whole = all(segment.num_elements * segment.num_bits % WORD_BITS == 0 for segment in plane_format.segments)
    if head_dim % LANES or not is_whole:
        raise ConfigError(f"KV cache: head_dim is {head_dim}; pages need a multiple of {LANES} (64, 80, 96, 128, ...).")
    return plane_format
