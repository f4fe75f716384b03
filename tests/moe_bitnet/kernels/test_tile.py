"""``tile`` and ``untile``: the bytes of moe_bitnet.tiles, whatever the backend."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import (
    IN_FEATURES,
    OUT_FEATURES,
    computing_with,
    operations_without_library,
    random_packed,
    torch_threads,
    variants_with,
)

from moe_bitnet import tiles
from moe_bitnet.errors import CheckpointError, ShapeError
from moe_bitnet.kernels import select
from moe_bitnet.packing import LAYOUTS, PackedTernary


@pytest.fixture(params=variants_with("tile", "untile"), scope="module", ids=str)
def variant(request):
    with computing_with(request.param) as variant:
        yield variant


@pytest.fixture(scope="module")
def tile(variant):
    return variant.select("tile")


@pytest.fixture(scope="module")
def untile(variant):
    return variant.select("untile")


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


def assert_tiles_and_back(tile, untile, packed):
    tiled, expected = tile(packed), tiles.tile(packed)
    assert tiled.tiles.dtype == torch.uint8
    assert torch.equal(tiled.tiles, expected.tiles)
    assert torch.equal(tiled.weight_scale, expected.weight_scale)
    assert (tiled.out_features, tiled.in_features, tiled.layout) == (
        expected.out_features,
        expected.in_features,
        expected.layout,
    )
    back = untile(tiled)
    assert torch.equal(back.weight_packed, packed.weight_packed)
    assert torch.equal(back.weight_scale, packed.weight_scale)
    assert (back.in_features, back.layout) == (packed.in_features, packed.layout)


@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_tiles_are_those_of_the_plain_function_and_untile_inverts_them(tile, untile, layout, in_features, out_features):
    assert_tiles_and_back(tile, untile, random_packed(out_features, in_features, layout=layout))


@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    in_features=st.integers(1, 90),
    out_features=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)
def test_tiles_are_those_of_the_plain_function_for_any_matrices(
    tile, untile, layout, leading, in_features, out_features, seed
):
    packed = random_packed(*leading, out_features, in_features, layout=layout, seed=seed)
    assert_tiles_and_back(tile, untile, packed)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(tile, untile, layout, num_threads):
    with torch_threads(num_threads):
        assert_tiles_and_back(tile, untile, random_packed(5, 130, 101, layout=layout))


def test_strides_do_not_matter(tile, layout):
    packed = random_packed(14, 33, layout=layout)
    view = dataclasses.replace(packed, weight_packed=packed.weight_packed[::2])
    assert torch.equal(tile(view).tiles, tiles.tile(view).tiles)


def test_what_fills_up_the_last_byte_of_a_row_means_nothing(tile, untile, layout):
    # one weight of 0 a row; its byte's other codes are 0 instead of 1, as another writer may leave them
    packed = random_packed(7, 1, layout=layout)
    bare = dataclasses.replace(packed, weight_packed=(packed.unpack() + 1).to(torch.uint8))
    assert torch.equal(tile(bare).tiles, tile(packed).tiles)
    assert torch.equal(untile(tile(bare)).weight_packed, packed.weight_packed)


@pytest.mark.parametrize(
    ("layout", "invalid"), [("2bit", 0b11), ("2bit", 0b11_00_00_00), ("2bit", 255), ("base3", 243), ("base3", 255)]
)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bytes_that_encode_no_weights_are_refused_with_their_number(layout, invalid, num_threads):
    packed = random_packed(2, 130, 33, layout=layout)
    damaged = packed.weight_packed.clone()
    for position in [(0, 0, 0), (0, 129, -1), (1, 64, 3)]:
        damaged[position] = invalid
    with torch_threads(num_threads), pytest.raises(CheckpointError, match=f"3 bytes encode no.*layout {layout}"):
        select("tile", "cpu", "cpp")(dataclasses.replace(packed, weight_packed=damaged))


def test_every_byte_is_refused_or_taken_as_the_layout_says(layout):
    cpp = select("tile", "cpu", "cpp")
    for byte in range(256):
        in_features = {"2bit": 4, "base3": 5}[layout]
        packed = PackedTernary(torch.tensor([[byte]], dtype=torch.uint8), torch.ones(1, 1), in_features, layout)
        is_valid = byte <= 242 if layout == "base3" else not byte & byte >> 1 & 0b01010101
        if is_valid:
            assert torch.equal(cpp(packed).tiles, tiles.tile(packed).tiles)
        else:
            with pytest.raises(CheckpointError, match="1 bytes"):
                cpp(packed)


def test_portable_bytes_of_another_width_or_dtype_are_refused_before_the_library_is_called(layout):
    packed, cpp = random_packed(7, 33, layout=layout), operations_without_library()
    for wrong in (
        dataclasses.replace(packed, in_features=41),
        dataclasses.replace(packed, in_features=28),
        dataclasses.replace(packed, weight_packed=packed.weight_packed.char()),
        dataclasses.replace(packed, weight_packed=packed.weight_packed[:, :-1]),
    ):
        with pytest.raises(ShapeError, match="need uint8 rows of"):
            cpp.tile(wrong)


def test_tiles_that_do_not_fit_their_sizes_are_refused_before_the_library_is_called(layout):
    tiled, cpp = tiles.tile(random_packed(2, 7, 33, layout=layout)), operations_without_library()
    for wrong in (
        dataclasses.replace(tiled, in_features=100),
        dataclasses.replace(tiled, out_features=65),
        dataclasses.replace(tiled, weight_scale=torch.ones(3, 1, 1)),
        dataclasses.replace(tiled, tiles=tiled.tiles.float()),
        dataclasses.replace(tiled, tiles=tiled.tiles[..., ::2]),
    ):
        with pytest.raises(ShapeError):
            cpp.untile(wrong)
