"""Ternary products in Triton's interpreter: exact integers; run by ``test_triton.py`` in a process of its own."""

import itertools

import pytest
import torch
from kernel_variants import offsets_of, random_packed, random_rows

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels import backend_reference as reference
from moe_bitnet.kernels.triton.operations import grouped_ternary_linear, ternary_linear
from moe_bitnet.kernels.triton.plan import PAIR_TILES, SINGLE_TILES, Tile, choose_tile, make_plan
from moe_bitnet.packing import LAYOUTS, PackedTernary, pack
from moe_bitnet.tiles import tile

TILES = sorted(set(itertools.chain(*SINGLE_TILES.values())), key=lambda each: (each.block_tokens, each.row_blocks))
SHAPES = [(1, 1), (7, 33), (33, 65), (65, 130), (130, 7), (129, 64), (161, 1), (700, 65)]
"""Inputs and outputs: around quads of 4, groups of 20, steps of 128 and 160, and blocks of 64."""
COUNTS = [[1], [0, 3, 0, 4], [1, 1, 1], [0, 0, 7], [7, 0, 0], [2, 31, 5, 0, 1], [0, 65, 1, 0]]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def plan_with(each, splits, num_rows, weight, num_experts=1):
    return make_plan(
        num_rows=num_rows,
        num_experts=num_experts,
        out_features=weight.out_features,
        in_features=weight.in_features,
        layout=weight.layout,
        num_multiprocessors=4,
        tile=each,
        num_splits=splits,
    )


@pytest.mark.parametrize("num_rows", [1, 7, 33, 65, 130])
def test_linear_equals_the_reference_for_any_number_of_rows(layout, num_rows):
    assert_linear_equals_the_reference(layout, num_rows, 161, 65)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_linear_equals_the_reference_for_any_shape(layout, in_features, out_features):
    for num_rows in (1, 17):
        assert_linear_equals_the_reference(layout, num_rows, in_features, out_features)


def assert_linear_equals_the_reference(layout, num_rows, in_features, out_features):
    weight = tile(random_packed(out_features, in_features, layout=layout))
    x_q, scale = random_rows(num_rows, in_features)
    output = ternary_linear(x_q, scale, weight)
    assert output.dtype == torch.float32
    assert torch.equal(output, reference.ternary_linear(x_q, scale, weight))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("each", TILES, ids=str)
def test_every_tile_and_split_gives_the_same_bits(layout, each, splits):
    weight = tile(random_packed(130, 400, layout=layout))
    x_q, scale = random_rows(each.block_tokens + 1, 400)
    plan = plan_with(each, splits, len(x_q), weight)
    assert plan.num_splits == splits
    assert torch.equal(ternary_linear(x_q, scale, weight, plan=plan), reference.ternary_linear(x_q, scale, weight))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(7, 1), (161, 65)])
def test_grouped_equals_the_reference(layout, counts, in_features, out_features):
    weight = tile(random_packed(len(counts), out_features, in_features, layout=layout))
    x_q, scale = random_rows(sum(counts), in_features)
    expected = reference.grouped_ternary_linear(x_q, scale, weight, offsets_of(counts))
    assert torch.equal(grouped_ternary_linear(x_q, scale, weight, offsets_of(counts)), expected)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_grouped_tiles_and_splits_give_the_same_bits(layout, splits, block_tokens):
    counts = [0, 9, 70, 0, 1]
    weight = tile(random_packed(5, 70, 200, layout=layout))
    x_q, scale = random_rows(80, 200)
    each = next(each for each in TILES if each.block_tokens == block_tokens)
    plan = plan_with(each, splits, 80, weight, num_experts=5)
    output = grouped_ternary_linear(x_q, scale, weight, offsets_of(counts), plan=plan)
    assert torch.equal(output, reference.grouped_ternary_linear(x_q, scale, weight, offsets_of(counts)))


@pytest.mark.parametrize("in_features", [1, 33, 1099])
@pytest.mark.parametrize(("x_value", "weight_value"), [(-128, -1), (-128, 1), (127, -1), (127, 1), (0, 1), (-128, 0)])
def test_extreme_sums_are_exact(layout, in_features, x_value, weight_value):
    x_q = torch.full((2, in_features), x_value, dtype=torch.int8)
    ternary = torch.full((65, in_features), weight_value, dtype=torch.int8)
    weight = tile(PackedTernary(pack(ternary, layout), torch.ones(1, 1), in_features, layout))
    assert bool((ternary_linear(x_q, torch.ones(2, 1), weight) == x_value * weight_value * in_features).all())


def test_the_longest_rows_do_not_overflow_int32():
    # field 3 of 2-bit weights of -1 sums up to 128 · 128 · 131,071, just below 2^31; everything else stays far below
    in_features = reference.MAX_IN_FEATURES
    x_q = torch.full((1, in_features), -128, dtype=torch.int8)
    ternary = torch.full((64, in_features), -1, dtype=torch.int8)
    weight = tile(PackedTernary(pack(ternary, "2bit"), torch.ones(1, 1), in_features, "2bit"))
    plan = plan_with(TILES[0], 1, 1, weight)
    output = ternary_linear(x_q, torch.ones(1, 1), weight, plan=plan)
    assert bool((output == 128 * in_features).all())


def test_portable_bytes_are_tiled_on_the_fly(layout):
    packed = random_packed(2, 33, 65, layout=layout)
    x_q, scale = random_rows(3, 65)
    offsets = torch.tensor([0, 1, 3])
    expected = reference.grouped_ternary_linear(x_q, scale, packed, offsets)
    assert torch.equal(grouped_ternary_linear(x_q, scale, packed, offsets), expected)


def test_scales_that_are_not_finite_stay_in_their_rows(layout):
    weight = tile(random_packed(7, 33, layout=layout))
    x_q, scale = random_rows(3, 33)
    expected = ternary_linear(x_q, scale, weight)
    x_q[1], scale[1] = 0, float("nan")
    output = ternary_linear(x_q, scale, weight)
    assert bool(output[1].isnan().all())
    assert torch.equal(output[[0, 2]], expected[[0, 2]])


def test_no_rows_give_no_rows(layout):
    weight = tile(random_packed(2, 7, 33, layout=layout))
    x_q, scale = random_rows(0, 33)
    assert ternary_linear(x_q, scale, weight.select(0)).shape == (0, 7)
    assert grouped_ternary_linear(x_q, scale, weight, torch.zeros(3, dtype=torch.int64)).shape == (0, 7)


def test_damaged_offsets_touch_nothing_outside():
    weight = tile(random_packed(2, 7, 33, layout="2bit"))
    x_q, scale = random_rows(5, 33)
    for offsets in ([0, 3, 10**6], [-9, 2, 5], [4, 2, 1], [0, 10**6, 5]):
        assert grouped_ternary_linear(x_q, scale, weight, torch.tensor(offsets)).shape == (5, 7)


def test_what_does_not_fit_is_refused():
    weight = tile(random_packed(2, 7, 33, layout="2bit"))
    x_q, scale = random_rows(3, 33)
    offsets = torch.tensor([0, 1, 3])
    refused = {
        "34 features": (*random_rows(3, 34), weight, offsets),
        r"torch\.float32": (x_q.float(), scale, weight, offsets),
        "activation_scale 2": (x_q, scale[:2], weight, offsets),
        "one matrix an expert": (x_q, scale, weight, torch.tensor([0, 1, 2, 3])),
        r"num_experts \+ 1": (x_q, scale, weight, torch.tensor([0])),
    }
    for message, arguments in refused.items():
        with pytest.raises(ShapeError, match=message):
            grouped_ternary_linear(*arguments)


@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize("capability_major", [8, 9, 10, 12])
def test_plans_cover_all_rows_features_and_steps(is_pair, capability_major):
    for num_rows, num_experts in itertools.product([1, 7, 16, 33, 500, 5000], [1, 5, 64]):
        for layout, in_features in itertools.product(LAYOUTS, [1, 4096, 14336]):
            plan = make_plan(
                num_rows=num_rows, num_experts=num_experts, out_features=4096, in_features=in_features, layout=layout,
                num_multiprocessors=132, capability_major=capability_major, is_pair=is_pair,
            )  # fmt: skip
            worst = [num_rows - min(num_experts, num_rows) + 1] + [1] * (min(num_experts, num_rows) - 1)
            assert plan.num_token_tiles >= sum(-(-count // plan.tile.block_tokens) for count in worst)
            assert plan.num_row_groups * plan.tile.row_blocks >= 64
            assert (plan.num_splits - 1) * plan.steps_per_split < plan.num_steps
            assert plan.num_splits * plan.steps_per_split >= plan.num_steps
            assert plan.num_steps * 2048 * (4 if plan.layout == "2bit" else 5) >= in_features * 64
    assert choose_tile(10**6, is_pair, capability_major).block_tokens >= 64
    assert all(isinstance(each, Tile) for tiles in PAIR_TILES.values() for each in tiles)
