"""Where each byte of a page lies: pure arithmetic, no tensors of codes are read or written here.

A page holds ``page_size`` tokens of one layer for all KV heads, as two planes. G is num_kv_heads, P page_size,
D head_dim, ``g`` group_size; the order of indices is the order of bytes, the last one running fastest.

    page            | key plane                      | value plane                    |

    16-bit plane    | element  f16 [G][P][D]                                          |
     8-bit plane    | scale    f16 [G][P]     | code i8 [G][P][D]                     |
     4-bit plane    | base     f16 (one)      | scale code u8 [G][P][D/g] | code pair u8 [G][P][D/2] |

The float16 part comes first and a plane is padded to an even number of bytes (at most one zero byte, at its end), so
that every float16 value in a pool of pages lies on an even address.
"""

from dataclasses import dataclass

FP16_BYTES = 2


@dataclass(frozen=True)
class PlaneFormat:
    """The keys or the values of a page: their sizes and how one element is stored.

    Attributes:
        num_bits: 16 (float16), 8 (int8, one scale per token and head) or 4 (compander codes, log scale per group).
        num_kv_heads: G.
        page_size: P, tokens.
        head_dim: D.
        group_size: channels that share a scale at 4 bits; divides ``head_dim``. Unused at 16 and 8 bits.
        is_rotated: codes describe the Walsh-Hadamard transform of the elements; never so at 16 bits.
    """

    num_bits: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    group_size: int
    is_rotated: bool

    @property
    def num_rows(self) -> int:
        """Vectors of ``head_dim`` elements in the plane: one per KV head and token."""
        return self.num_kv_heads * self.page_size

    @property
    def num_elements(self) -> int:
        """Key or value elements in the plane."""
        return self.num_rows * self.head_dim

    @property
    def num_groups(self) -> int:
        """Groups of ``group_size`` channels in the plane (4 bits)."""
        return self.num_elements // self.group_size

    @property
    def scale_bytes(self) -> int:
        """Bytes before the codes: scales, or the base and the scale codes."""
        return {16: 0, 8: FP16_BYTES * self.num_rows, 4: FP16_BYTES + self.num_groups}[self.num_bits]

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, or of the float16 elements."""
        return self.num_elements * self.num_bits // 8

    @property
    def plane_bytes(self) -> int:
        """Bytes of the plane, scales and the padding to an even count included."""
        num_bytes = self.scale_bytes + self.code_bytes
        return num_bytes + num_bytes % FP16_BYTES

    @property
    def effective_bits(self) -> float:
        """Stored bits per element, everything included."""
        return 8 * self.plane_bytes / self.num_elements


@dataclass(frozen=True)
class PageFormat:
    """A page: the plane of its keys, then the plane of its values.

    Attributes:
        key: format of the first plane.
        value: format of the second plane; same sizes, perhaps other bits.
    """

    key: PlaneFormat
    value: PlaneFormat

    @property
    def page_bytes(self) -> int:
        """Bytes of one page; always even."""
        return self.key.plane_bytes + self.value.plane_bytes
