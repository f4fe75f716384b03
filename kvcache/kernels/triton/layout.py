"""A layer's format as the numbers that a kernel is compiled for.

A product on tensor cores sums over at least 32 bytes, and sizes in Triton are powers of two. So every segment of a key
is padded for itself: its levels beyond the end meet digits of zero.
"""

from typing import NamedTuple

from kvcache.page import LayerFormat, PlaneFormat

MIN_SUMMED = 32
"""Elements of int8 that an instruction of the tensor cores sums over."""

LINE_BYTES = 64
"""Planes, heads, layers and pages begin on multiples of this."""


class KeySegment(NamedTuple):
    """Where a segment of the keys lies, in a page and among the digits of a query.

    Attributes:
        num_elements: channels.
        num_bits: 8, 4, 2 or 1.
        num_padded: channels, padded.
        first_element: its first channel.
        first_word: its first word in a lane.
        first_column: its first digit; 8-bit segments have high digits, then low ones, ``num_padded`` of each.
    """

    num_elements: int
    num_bits: int
    num_padded: int
    first_element: int
    first_word: int
    first_column: int


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Return the channels of a tile: a power of two that tensor cores can sum over."""
    return max(MIN_SUMMED, power_of_two(head_dim))


def key_segments(key: PlaneFormat) -> tuple[KeySegment, ...]:
    """Lay the segments of a key out; none at 16 bits."""
    segments = []
    first_element = first_word = first_column = 0
    for segment in key.segments:
        num_padded = max(MIN_SUMMED, power_of_two(segment.num_elements))
        segments.append(
            KeySegment(segment.num_elements, segment.num_bits, num_padded, first_element, first_word, first_column)
        )
        first_element += segment.num_elements
        first_word += segment.num_words
        first_column += num_padded * (2 if segment.num_bits == 8 else 1)
    return tuple(segments)


def num_digit_columns(segments: tuple[KeySegment, ...]) -> int:
    """Return the digits of a query, padding included; one column stands for none."""
    if not segments:
        return 1
    last = segments[-1]
    return last.first_column + last.num_padded * (2 if last.num_bits == 8 else 1)


def page_constants(layer_format: LayerFormat) -> dict[str, object]:
    """Return the constants of a kernel that reads packed pages."""
    return {
        "HEAD_DIM": layer_format.head_dim,
        "HEAD_DIM_PADDED": padded_head_dim(layer_format.head_dim),
        "KEY_SEGMENTS": tuple(tuple(segment) for segment in key_segments(layer_format.key)),
        "NUM_DIGITS": num_digit_columns(key_segments(layer_format.key)),
        "VALUE_BITS": layer_format.value.num_bits,
        "KEY_CODE_BYTES": layer_format.key.code_bytes,
        "KEY_PLANE_BYTES": layer_format.key.plane_bytes,
        "VALUE_CODE_BYTES": layer_format.value.code_bytes,
        "HEAD_LINES": layer_format.head_bytes // LINE_BYTES,
    }
