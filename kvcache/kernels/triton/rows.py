"""Which rows and pages a program works on, found on the GPU: the host never waits for the batch's offsets.

A *row* of a KV head is one new token and one of the ``GROUP`` query heads that share the head. A sequence with n new
tokens has ``n · GROUP`` rows, cut into tiles of ``BLOCK_ROWS``; the host knows an upper bound of all tiles, and a
program beyond the last one returns at once.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tile(
    row_offsets,
    num_sequences,
    tile,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MAX_SEQUENCES: tl.constexpr,
):
    """Find the sequence and the rows of a tile.

    Args:
        row_offsets: pointer to int64 ``[num_sequences + 1]``, in tokens.
        num_sequences: how many sequences.
        tile: which tile, counted over all sequences.
        GROUP: query heads of a KV head.
        BLOCK_ROWS: rows of a tile.
        MAX_SEQUENCES: a power of two, at least ``num_sequences``.
    Returns:
        The sequence, its first token, the tile's first row within the sequence, and how many rows the sequence has
        (no more than the first row if the tile is beyond the last).
    """
    sequences = tl.arange(0, MAX_SEQUENCES)
    is_sequence = sequences < num_sequences
    starts = tl.load(row_offsets + sequences, mask=is_sequence, other=0).to(tl.int32)
    stops = tl.load(row_offsets + sequences + 1, mask=is_sequence, other=0).to(tl.int32)
    num_tiles = ((stops - starts) * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(num_tiles, axis=0)
    is_mine = (ends > tile) & (ends - num_tiles <= tile) & is_sequence
    sequence = tl.sum(tl.where(is_mine, sequences, 0), axis=0)
    first_token = tl.sum(tl.where(is_mine, starts, 0), axis=0)
    first_row = tl.sum(tl.where(is_mine, (tile - ends + num_tiles) * BLOCK_ROWS, 0), axis=0)
    num_rows = tl.sum(tl.where(is_mine, (stops - starts) * GROUP, 0), axis=0)
    return sequence, first_token, first_row, num_rows


@triton.jit
def query_rows(tile_rows, first_token, first_row, head, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Say which of the call's ``num_tokens · NUM_HEADS`` queries the rows of a tile are.

    Args:
        tile_rows: int32 ``[rows]``, rows of the KV head, counted from the first row of ``first_token``.
        first_token: token of row 0.
        first_row: smallest of the rows.
        head: the KV head.
        NUM_HEADS: query heads.
        GROUP: query heads of a KV head.
    Returns:
        A query at or before all of them, int64, and the distances from there, int32 ``[rows]``: pointers move by the
        first, which takes no registers of the threads.
    """
    first = first_row // GROUP
    base = tl.cast(first_token + first, tl.int64) * NUM_HEADS + head * GROUP
    return base, (tile_rows // GROUP - first) * NUM_HEADS + tile_rows % GROUP


@triton.jit
def split_pages(page_offsets, sequence, split, num_splits):
    """Return the first page of a program's share of a sequence's pages, and the end of the share."""
    start = tl.load(page_offsets + sequence).to(tl.int32)
    stop = tl.load(page_offsets + sequence + 1).to(tl.int32)
    share = (stop - start + num_splits - 1) // num_splits
    first = start + split * share
    return first, tl.minimum(first + share, stop)
