"""The layout that kernels read: every code is where the drawing says, and nothing is lost on the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import IN_FEATURES, OUT_FEATURES, random_packed

from moe_bitnet.packing import LAYOUTS
from moe_bitnet.tiles import block_bytes, num_row_blocks, tile, untile


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


def code_in_tiles(blocks, row, column, layout):
    """Find the code of one weight in one matrix's tiles, by the drawing of moe_bitnet/tiles.py."""
    block, row_of_block = blocks[row // 64].tolist(), row % 64
    field, lane = row_of_block // 16, row_of_block % 16
    if layout == "2bit":
        quad, i = column // 4, column % 4
        return block[64 * quad + 4 * lane + i] >> (2 * field) & 3
    group, quad, i = column // 20, column % 20 // 4, column % 4
    if quad < 4:
        return block[64 * (4 * group + quad) + 4 * lane + i] // 3**field % 3
    # the fifth quad: the highest digit of the line of the row's own sixteen
    return block[64 * (4 * group + field) + 4 * lane + i] // 81


@pytest.mark.parametrize("in_features", [1, 4, 5, 16, 17, 20, 41])
def test_every_code_is_where_it_is_drawn(layout, in_features):
    out_features = 130
    packed = random_packed(out_features, in_features, layout=layout)
    tiles, ternary = tile(packed).tiles, packed.unpack()
    for row in range(0, out_features, 7):
        for column in range(in_features):
            assert code_in_tiles(tiles, row, column, layout) == ternary[row, column] + 1


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (21, 65), (64, 64)])
def test_padding_holds_weight_zero(layout, in_features, out_features):
    tiles = tile(random_packed(out_features, in_features, layout=layout)).tiles
    padded_columns = {"2bit": -(-in_features // 4) * 4, "base3": -(-in_features // 20) * 20}[layout]
    for row in range(0, num_row_blocks(out_features) * 64, 3):
        for column in range(0 if row >= out_features else in_features, padded_columns):
            assert code_in_tiles(tiles, row, column, layout) == 1


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    in_features=st.integers(1, 90),
    out_features=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)
def test_untile_inverts_tile(layout, leading, in_features, out_features, seed):
    packed = random_packed(*leading, out_features, in_features, layout=layout, seed=seed)
    tiled = tile(packed)
    assert tiled.tiles.dtype == torch.uint8
    assert tiled.tiles.shape == (*leading, num_row_blocks(out_features), block_bytes(in_features, layout))
    assert (tiled.out_features, tiled.in_features, tiled.layout) == (out_features, in_features, layout)
    assert torch.equal(tiled.unpack(), packed.unpack())
    back = untile(tiled)
    assert torch.equal(back.weight_packed, packed.weight_packed)
    assert torch.equal(back.weight_scale, packed.weight_scale)
    assert (back.in_features, back.layout) == (in_features, layout)


def test_a_selected_matrix_is_the_one_that_was_tiled(layout):
    packed = random_packed(3, 65, 21, layout=layout)
    tiled = tile(packed)
    for index in range(3):
        alone = tile(packed.select(index))
        assert torch.equal(tiled.select(index).tiles, alone.tiles)
        assert torch.equal(tiled.select(index).weight_scale, alone.weight_scale)


@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_tiles_take_the_bits_of_the_layout_and_their_padding(layout, in_features, out_features):
    tiled = tile(random_packed(out_features, in_features, layout=layout))
    unit, bytes_of_unit = {"2bit": (4, 64), "base3": (20, 256)}[layout]
    assert tiled.tiles.numel() == -(-out_features // 64) * -(-in_features // unit) * bytes_of_unit
    assert tiled.num_bytes == tiled.tiles.numel() + 4
    # without padding 64 rows of the unit's inputs take 2 or 1.6 bits each
    assert bytes_of_unit * 8 == 64 * unit * {"2bit": 2.0, "base3": 1.6}[layout]
