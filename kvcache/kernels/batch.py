"""Which pages the new tokens of several sequences attend to."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The past of every sequence of a call, for one layer; B sequences, T new tokens and P pages in all.

    Sequence s owns rows ``row_offsets[s]`` to ``row_offsets[s + 1]`` of the call's tokens and entries
    ``page_offsets[s]`` to ``page_offsets[s + 1]`` of the page arrays, oldest first. Every new token sees all tokens of
    these pages, and of the new tokens of its sequence those up to itself.

    Attributes:
        packed: uint8 ``[num_packed_pages, page_bytes]``, the memory of packed pages; rows start on multiples of 64.
        exact: uint8 ``[num_exact_pages, exact_page_bytes]``, the memory of float16 pages.
        packed_layer_offset: where the layer begins in a packed page, bytes.
        exact_layer_offset: where it begins in an exact page, bytes.
        row_offsets: int64 ``[B + 1]``.
        page_offsets: int64 ``[B + 1]``.
        page_ids: int32 ``[P]``, rows of ``packed`` or ``exact``.
        page_is_packed: uint8 ``[P]``, 1 or 0.
        page_num_tokens: int32 ``[P]``, tokens that count: 64, or less in the last page of a sequence.
        scale: what scores are multiplied with, usually ``1 / sqrt(head_dim)``.
    """

    packed: Tensor
    exact: Tensor
    packed_layer_offset: int
    exact_layer_offset: int
    row_offsets: Tensor
    page_offsets: Tensor
    page_ids: Tensor
    page_is_packed: Tensor
    page_num_tokens: Tensor
    scale: float
