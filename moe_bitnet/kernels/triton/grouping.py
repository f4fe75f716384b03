"""Which expert's rows a program works on, found on the GPU: the host never waits for the expert offsets.

The host knows only how many rows and experts there are. The rows of an expert make ``ceil(rows / BLOCK_TOKENS)``
tiles, so all experts together at most ``num_rows // BLOCK_TOKENS + num_experts``; a program beyond the last tile
returns at once.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tile(expert_offsets, num_experts, num_rows, tile, BLOCK_TOKENS: tl.constexpr, MAX_EXPERTS: tl.constexpr):
    """Find the expert and the rows of a tile.

    Args:
        expert_offsets: pointer to int64 ``[num_experts + 1]``.
        num_experts: how many experts.
        num_rows: rows of x; bounds what damaged offsets can reach.
        tile: which tile, counted over all experts.
        BLOCK_TOKENS: rows of a tile.
        MAX_EXPERTS: a power of two, at least ``num_experts``.
    Returns:
        The expert (0 if the tile is beyond the last), the first row of the tile and the end of the expert's rows.
    """
    experts = tl.arange(0, MAX_EXPERTS)
    is_expert = experts < num_experts
    starts = tl.load(expert_offsets + experts, mask=is_expert, other=0).to(tl.int32)
    stops = tl.load(expert_offsets + experts + 1, mask=is_expert, other=0).to(tl.int32)
    num_tiles = (stops - starts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = tl.cumsum(num_tiles, axis=0)
    is_mine = (ends > tile) & (ends - num_tiles <= tile) & is_expert
    expert = tl.sum(tl.where(is_mine, experts, 0), axis=0)
    first_row = tl.sum(tl.where(is_mine, starts + (tile - ends + num_tiles) * BLOCK_TOKENS, 0), axis=0)
    last_row = tl.sum(tl.where(is_mine, stops, 0), axis=0)
    return expert, tl.maximum(first_row, 0), tl.minimum(last_row, num_rows)


@triton.jit
def expert_of_row(expert_offsets, num_experts, row, MAX_EXPERTS: tl.constexpr):
    """Return the expert that owns a row: as many experts end at or before it.

    Args:
        expert_offsets: pointer to int64 ``[num_experts + 1]``.
        num_experts: how many experts.
        row: which row.
        MAX_EXPERTS: a power of two, at least ``num_experts``.
    """
    experts = tl.arange(0, MAX_EXPERTS)
    stops = tl.load(expert_offsets + experts + 1, mask=experts < num_experts - 1, other=row + 1)
    return tl.sum((stops <= row).to(tl.int32), axis=0)
