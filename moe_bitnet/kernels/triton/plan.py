"""How a product is cut into programs: sizes of tiles, warps, and shares of the inputs.

A plan depends on shapes and on the GPU alone, so it is made on the host without waiting for the device. The numbers
follow from registers and multiprocessors, and are checked by compiling (no spills); they were not tuned on a GPU.
"""

from dataclasses import dataclass

from moe_bitnet.packing import Layout
from moe_bitnet.tiles import LINE_BYTES, block_bytes, num_row_blocks

STEP_BYTES = 32 * LINE_BYTES
"""Bytes of a block that one step of the loop takes."""

MIN_STEPS_PER_SPLIT = 4
"""Fewer would not fill the pipeline of loads."""

MAX_SPLITS = 16


@dataclass(frozen=True)
class Tile:
    """What one program computes at a time.

    Attributes:
        block_tokens: rows of x.
        row_blocks: blocks of 64 weight rows.
        num_warps: warps of a program.
        num_stages: steps whose loads are in flight.
        programs_per_multiprocessor: programs that should be there for each multiprocessor.
    """

    block_tokens: int
    row_blocks: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int

    @property
    def sums_rows(self) -> bool:
        """Whether a program adds up its own rows of x.

        With few rows the extra product is cheaper than another launch.
        """
        return self.block_tokens <= 16


@dataclass(frozen=True)
class Plan:
    """How one product is cut.

    Attributes:
        tile: what a program computes.
        num_row_groups: programs along the weight's rows.
        num_token_tiles: programs along the rows of x, over all experts; an upper bound.
        num_splits: programs along the inputs.
        layout: bits a weight while multiplying.
        steps_per_split: steps of one of them; the last may have fewer.
        num_steps: steps of all.
    """

    tile: Tile
    num_row_groups: int
    num_token_tiles: int
    num_splits: int
    layout: Layout
    steps_per_split: int
    num_steps: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs to launch."""
        return self.num_row_groups, self.num_token_tiles, self.num_splits


_NARROW = (Tile(8, 1, 1, 4, 12), Tile(16, 2, 2, 4, 6), Tile(32, 4, 8, 4, 2))
_NARROW_PAIR = (Tile(8, 1, 1, 4, 8), Tile(16, 1, 2, 4, 6))
SINGLE_TILES = {
    8: (*_NARROW, Tile(64, 4, 8, 3, 2)),
    9: (*_NARROW, Tile(64, 4, 8, 3, 2), Tile(128, 4, 8, 3, 1)),
    10: (*_NARROW, Tile(64, 2, 8, 3, 2), Tile(128, 4, 8, 3, 1)),
}
"""For one matrix: the major compute capability (or the next lower key) to tiles, by rows of x.

Hopper (9) multiplies 64 weight rows at a time from a group of four warps, which takes four row blocks."""

PAIR_TILES = {
    8: (*_NARROW_PAIR, Tile(32, 1, 4, 4, 3), Tile(64, 2, 8, 3, 1)),
    9: (*_NARROW_PAIR, Tile(32, 4, 8, 3, 2), Tile(64, 4, 8, 3, 1)),
    10: (*_NARROW_PAIR, Tile(32, 1, 4, 4, 3), Tile(64, 2, 8, 3, 1)),
}
"""For two matrices that share x: twice the accumulators."""

MAX_BASE3_TOKENS = 32
"""Tiles of more rows take 2-bit weights; base 3 is repacked before (see :mod:`moe_bitnet.kernels.triton.repack`)."""


def choose_tile(rows_per_expert: int, is_pair: bool, capability_major: int) -> Tile:
    """Return the smallest tile that holds the rows of an average expert, or the largest there is."""
    table = PAIR_TILES if is_pair else SINGLE_TILES
    tiles = table[max(8, min(capability_major, 10))]
    return next((tile for tile in tiles if rows_per_expert <= tile.block_tokens), tiles[-1])


def make_plan(
    *,
    num_rows: int,
    num_experts: int,
    out_features: int,
    in_features: int,
    layout: Layout,
    num_multiprocessors: int,
    capability_major: int = 9,
    is_pair: bool = False,
    tile: Tile | None = None,
    num_splits: int | None = None,
) -> Plan:
    """Cut the product of ``num_rows`` rows, spread over experts, with their matrices.

    Args:
        num_rows: rows of x, at least one.
        num_experts: matrices; one for a plain product.
        out_features: rows of a matrix.
        in_features: columns of a matrix.
        layout: bits a weight, as stored.
        num_multiprocessors: of the GPU.
        capability_major: of the GPU: 8 Ampere and Ada, 9 Hopper, 10 and 12 Blackwell.
        is_pair: two matrices share x.
        tile: instead of the choice by size.
        num_splits: instead of the choice by size; at most one a step is made.
    """
    tile = tile or choose_tile(-(-num_rows // num_experts), is_pair, capability_major)
    if tile.block_tokens > MAX_BASE3_TOKENS:
        layout = "2bit"
    num_row_groups = -(-num_row_blocks(out_features) // tile.row_blocks)
    num_token_tiles = -(-num_rows // tile.block_tokens)
    num_likely_tiles = max(num_token_tiles, min(num_experts, num_rows))
    if num_experts > 1:
        # each expert with rows may end in a tile that is not full
        num_token_tiles = num_rows // tile.block_tokens + min(num_experts, num_rows)
    num_steps = -(-block_bytes(in_features, layout) // STEP_BYTES)
    if num_splits is None:
        wanted = num_multiprocessors * tile.programs_per_multiprocessor // (num_row_groups * num_likely_tiles)
        num_splits = max(1, min(wanted, MAX_SPLITS, num_steps // MIN_STEPS_PER_SPLIT))
    steps_per_split = -(-num_steps // num_splits)
    return Plan(
        tile=tile,
        num_row_groups=num_row_groups,
        num_token_tiles=num_token_tiles,
        num_splits=-(-num_steps // steps_per_split),
        layout=layout,
        steps_per_split=steps_per_split,
        num_steps=num_steps,
    )
