"""How a call of attention is cut into programs, from shapes and the GPU alone: the host never waits for the device.

The sizes follow from registers, and are checked by compiling (no spills up to 128 channels); they were not tuned on a
GPU. Blackwell (10) multiplies at least 16 rows with its own instruction (Triton 3.9 fails to compile 8), and leaves a
token or channel with all its rows in one thread, which takes more registers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program computes at a time.

    Attributes:
        block_rows: new tokens of a sequence times query heads of a KV head.
        num_warps: warps of a program.
    """

    block_rows: int
    num_warps: int


TILES = {
    8: (Tile(8, 4), Tile(16, 8), Tile(32, 8)),
    9: (Tile(8, 4), Tile(16, 4), Tile(32, 8)),
    10: (Tile(16, 8),),
}
"""By major compute capability; consumer Blackwell (12) has the instructions of 8."""

MAX_WIDE_ROWS = 16
"""Most rows of a tile for more than ``WIDE`` channels, with eight warps."""
WIDE = 128

PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_PAGES_PER_SPLIT = 4
MAX_SPLITS = 64


@dataclass(frozen=True)
class Plan:
    """How one call is cut.

    Attributes:
        tile: what a program computes.
        num_tiles: programs along the rows of all sequences; an upper bound.
        num_splits: shares of every sequence's pages.
    """

    tile: Tile
    num_tiles: int
    num_splits: int


def make_plan(
    *,
    num_tokens: int,
    num_sequences: int,
    num_pages: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    num_multiprocessors: int,
    capability_major: int = 9,
    tile: Tile | None = None,
    num_splits: int | None = None,
) -> Plan:
    """Cut a call.

    Args:
        num_tokens: new tokens of all sequences, at least one.
        num_sequences: sequences, at least one.
        num_pages: pages of all sequences.
        group: query heads of a KV head.
        num_kv_heads: KV heads.
        head_dim: channels.
        num_multiprocessors: of the GPU.
        capability_major: of the GPU.
        tile: instead of the choice by size.
        num_splits: instead of the choice by size.
    """
    num_rows = num_tokens * group
    tile = tile or choose_tile(-(-num_rows // num_sequences), head_dim, capability_major)
    if num_splits is None:
        likely_programs = max(num_sequences, num_rows // tile.block_rows) * num_kv_heads
        wanted = num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // likely_programs
        pages_per_sequence = -(-num_pages // num_sequences)
        num_splits = max(1, min(wanted, MAX_SPLITS, pages_per_sequence // MIN_PAGES_PER_SPLIT))
    # each sequence may end in a tile that is not full
    return Plan(tile, num_rows // tile.block_rows + num_sequences, num_splits)


def choose_tile(rows_per_sequence: int, head_dim: int, capability_major: int) -> Tile:
    """Return the smallest tile that holds the rows of an average sequence, or the largest there is."""
    tiles = TILES.get(capability_major, TILES[8])
    if head_dim > WIDE:
        block_rows = 8 if rows_per_sequence <= 8 and capability_major != 10 else MAX_WIDE_ROWS
        return Tile(block_rows, 8)
    return next((tile for tile in tiles if rows_per_sequence <= tile.block_rows), tiles[-1])
