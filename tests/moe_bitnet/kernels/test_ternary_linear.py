"""``ternary_linear`` and ``grouped_ternary_linear``: exact integers, whatever the backend and the instruction set."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import (
    COLUMN_COUNTS,
    FORMS,
    IN_FEATURES,
    OUT_FEATURES,
    computing_with,
    offsets_of,
    operations_without_library,
    random_packed,
    random_rows,
    torch_threads,
    variants_with,
)

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.backend_reference import MAX_IN_FEATURES
from moe_bitnet.packing import LAYOUTS, PackedTernary, pack
from moe_bitnet.tiles import tile


@pytest.fixture(params=variants_with("ternary_linear", "grouped_ternary_linear"), scope="module", ids=str)
def variant(request):
    with computing_with(request.param) as variant:
        yield variant


@pytest.fixture(scope="module")
def linear(variant):
    return variant.select("ternary_linear")


@pytest.fixture(scope="module")
def grouped(variant):
    return variant.select("grouped_ternary_linear")


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


@pytest.fixture(params=FORMS, scope="module")
def given_as(request):
    """The weight as the operation gets it: portable bytes or tiles."""
    return FORMS[request.param]


def oracle(x_q, activation_scale, ternary, weight_scale):
    """Integer sums in float64, which counts every integer below 2^53; one product of the scales, one rescale."""
    sums = x_q.double() @ ternary.double().T
    assert not (sums.abs() >= 2**24).any(), "float32 counts every integer below"
    return sums.float() * (activation_scale * weight_scale)


def grouped_oracle(x_q, activation_scale, weight, offsets):
    ternary, output = weight.unpack(), torch.empty(len(x_q), weight.out_features)
    for expert, matrix in enumerate(ternary):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        output[rows] = oracle(x_q[rows], activation_scale[rows], matrix, weight.weight_scale[expert])
    return output


def constant_weight(value, out_features, in_features, layout):
    ternary = torch.full((out_features, in_features), value, dtype=torch.int8)
    return PackedTernary(pack(ternary, layout), torch.ones(1, 1), in_features, layout)


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 33),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)
def test_equals_the_integer_oracle(linear, layout, given_as, num_rows, in_features, out_features, seed):
    x_q, scale = random_rows(num_rows, in_features, seed)
    weight = random_packed(out_features, in_features, layout=layout, seed=seed)
    output = linear(x_q, scale, given_as(weight))
    assert output.dtype == torch.float32
    assert torch.equal(output, oracle(x_q, scale, weight.unpack(), weight.weight_scale))


@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_every_number_of_columns_and_rows_of_a_block_is_exact(linear, layout, given_as, in_features):
    x_q, scale = random_rows(max(COLUMN_COUNTS), in_features)
    whole = random_packed(max(OUT_FEATURES), in_features, layout=layout)
    expected = oracle(x_q, scale, whole.unpack(), whole.weight_scale)
    for out_features in OUT_FEATURES:
        weight = given_as(PackedTernary(whole.weight_packed[:out_features], whole.weight_scale, in_features, layout))
        for count in COLUMN_COUNTS:
            output = linear(x_q[:count], scale[:count], weight)
            assert torch.equal(output, expected[:count, :out_features]), (count, out_features)


@pytest.mark.parametrize("in_features", [127, 128, 129, 1000, 4099, MAX_IN_FEATURES])
def test_long_rows_are_exact(linear, layout, in_features):
    # 1, 2 and 6 columns take different paths, 13 expand base 3 before the product
    x_q, scale = random_rows(13, in_features)
    weight = random_packed(3, in_features, layout=layout)
    expected, tiles = oracle(x_q, scale, weight.unpack(), weight.weight_scale), tile(weight)
    for count in (1, 2, 6, 13):
        assert torch.equal(linear(x_q[:count], scale[:count], tiles), expected[:count])


@pytest.mark.parametrize("in_features", [1, 7, 33, 256, 4099, MAX_IN_FEATURES])
@pytest.mark.parametrize("x_value", [-128, 127])
@pytest.mark.parametrize("weight_value", [-1, 1])
def test_extreme_sums_do_not_overflow(linear, layout, in_features, x_value, weight_value):
    weight = tile(constant_weight(weight_value, 1, in_features, layout))
    for count in (1, 2, 6, 13):
        x_q = torch.full((count, in_features), x_value, dtype=torch.int8)
        output = linear(x_q, torch.ones(count, 1), weight)
        assert output.tolist() == [[x_value * weight_value * in_features]] * count


def test_rows_that_float32_cannot_sum_exactly_are_refused(linear, layout):
    assert 128 * MAX_IN_FEATURES < 2**24 <= 128 * (MAX_IN_FEATURES + 1), "beyond, an odd sum may lie between two floats"
    in_features = MAX_IN_FEATURES + 1
    weight = constant_weight(1, 1, in_features, layout)
    with pytest.raises(ShapeError, match=f"{in_features} inputs exceed {MAX_IN_FEATURES}"):
        linear(torch.ones(1, in_features, dtype=torch.int8), torch.ones(1, 1), weight)


def test_zeros_give_zeros(linear, layout, given_as):
    x_q, scale = random_rows(3, 33)
    weight = random_packed(7, 33, layout=layout)
    assert not linear(torch.zeros_like(x_q), scale, given_as(weight)).any()
    assert not linear(x_q, scale, given_as(constant_weight(0, 7, 33, layout))).any()


def test_no_rows_give_no_rows(linear, grouped, layout, given_as):
    x_q, scale = random_rows(0, 33)
    assert linear(x_q, scale, given_as(random_packed(7, 33, layout=layout))).shape == (0, 7)
    experts = given_as(random_packed(3, 7, 33, layout=layout))
    assert grouped(x_q, scale, experts, torch.zeros(4, dtype=torch.int64)).shape == (0, 7)


def test_strides_do_not_matter(linear, layout, given_as):
    weight = given_as(random_packed(7, 33, layout=layout))
    x_q, scale = random_rows(66, 33)
    for rows in (slice(None, None, 2), slice(3, 30)):
        assert torch.equal(
            linear(x_q[rows], scale[rows], weight), linear(x_q[rows].contiguous(), scale[rows].contiguous(), weight)
        )
    turned = x_q[:33].T
    assert torch.equal(linear(turned, scale[:33], weight), linear(turned.contiguous(), scale[:33], weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_whose_scale_is_not_finite_spares_the_others(linear, layout, value):
    # what quantize_activation gives for such a row: that scale and integers of 0
    weight = tile(random_packed(65, 33, layout=layout))
    x_q, scale = random_rows(8, 33)
    expected = linear(x_q, scale, weight)
    x_q[3], scale[3] = 0, value
    output, keep = linear(x_q, scale, weight), torch.arange(8) != 3
    assert bool(output[3].isnan().all())
    assert torch.equal(output[keep], expected[keep])


@pytest.mark.parametrize("wrong", [31, 32, 34, 36])
def test_other_inner_sizes_are_refused(linear, grouped, layout, given_as, wrong):
    x_q, scale = random_rows(3, wrong)
    with pytest.raises(ShapeError, match=f"{wrong} features.*packed for 33"):
        linear(x_q, scale, given_as(random_packed(7, 33, layout=layout)))
    experts = given_as(random_packed(2, 7, 33, layout=layout))
    with pytest.raises(ShapeError, match=f"{wrong} features.*packed for 33"):
        grouped(x_q, scale, experts, torch.tensor([0, 1, 3]))


COUNTS = [
    [1],
    [33],
    [0, 3, 0, 4],
    [1, 1, 1],
    [0, 0, 7],
    [7, 0, 0],
    [0, 0],
    [2, 31, 5, 0, 1],
    list(range(15)),
    [0, 13, 1, 0],
]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_equals_the_oracle_one_by_one(grouped, linear, layout, given_as, counts):
    offsets = offsets_of(counts)
    for in_features, out_features in [(1, 1), (7, 33), (33, 7), (64, 130), (20, 65)]:
        x_q, scale = random_rows(sum(counts), in_features)
        weight = random_packed(len(counts), out_features, in_features, layout=layout)
        experts = given_as(weight)
        output = grouped(x_q, scale, experts, offsets)
        assert output.dtype == torch.float32
        assert output.shape == (sum(counts), out_features)
        assert torch.equal(output, grouped_oracle(x_q, scale, weight, offsets))
        for expert in range(len(counts)):
            rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
            assert torch.equal(output[rows], linear(x_q[rows], scale[rows], experts.select(expert)))


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(0, 15), min_size=1, max_size=5),
    in_features=st.integers(1, 45),
    out_features=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_grouped_equals_the_oracle_however_rows_are_spread(
    grouped, layout, given_as, counts, in_features, out_features, seed
):
    x_q, scale = random_rows(sum(counts), in_features, seed)
    weight = random_packed(len(counts), out_features, in_features, layout=layout, seed=seed)
    offsets = offsets_of(counts)
    output = grouped(x_q, scale, given_as(weight), offsets)
    assert torch.equal(output, grouped_oracle(x_q, scale, weight, offsets))


def test_both_layouts_give_the_same_bits(linear):
    outputs = [linear(*random_rows(7, 33), random_packed(20, 33, layout=layout)) for layout in LAYOUTS]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(linear, grouped, layout, num_threads):
    # large enough that the work is worth three threads
    in_features, counts = 1000, [0, 1, 14, 0, 6]
    x_q, scale = random_rows(sum(counts), in_features)
    weight, offsets = random_packed(len(counts), 210, in_features, layout=layout), offsets_of(counts)
    expected, tiles = grouped_oracle(x_q, scale, weight, offsets), tile(weight)
    with torch_threads(num_threads):
        for _ in range(3):
            assert torch.equal(grouped(x_q, scale, tiles, offsets), expected)
        assert torch.equal(linear(x_q[1:15], scale[1:15], tiles.select(2)), expected[1:15])


def refused_calls():
    weight = tile(random_packed(2, 7, 33, layout="2bit"))
    x_q, scale = random_rows(3, 33)
    offsets = torch.tensor([0, 1, 3])

    def with_offsets(*bounds):
        return (x_q, scale, weight, torch.tensor(bounds))

    def with_weight(**changes):
        return (x_q, scale, dataclasses.replace(weight, **changes), offsets)

    return {
        "x is not int8": (x_q.float(), scale, weight, offsets),
        "x has three dimensions": (x_q.unsqueeze(0), scale, weight, offsets),
        "too few scales": (x_q, scale[:2], weight, offsets),
        "too many scales": (x_q, torch.ones(4, 1), weight, offsets),
        "offsets that do not begin at 0": with_offsets(1, 1, 3),
        "offsets that end early": with_offsets(0, 1, 2),
        "offsets that end late": with_offsets(0, 1, 4),
        "offsets that fall": with_offsets(0, 4, 3),
        "negative offsets": with_offsets(0, -1, 3),
        "too few offsets": with_offsets(0, 3),
        "too many offsets": with_offsets(0, 1, 2, 3),
        "tiles cut short": with_weight(tiles=weight.tiles[..., :-1].contiguous()),
        "tiles of another matrix": with_weight(out_features=65),
        "tiles of another layout": with_weight(layout="base3"),
        "tiles of another dtype": with_weight(tiles=weight.tiles.char()),
        "tiles with gaps": with_weight(tiles=weight.tiles.repeat_interleave(2, dim=-1)[..., ::2]),
        "too few weight scales": with_weight(weight_scale=weight.weight_scale[:1]),
        "weight scales of another dtype": with_weight(weight_scale=weight.weight_scale.double()),
        "no outputs": with_weight(tiles=weight.tiles[:, :0].contiguous(), out_features=0),
    }


@pytest.mark.parametrize("name", refused_calls())
def test_what_would_read_beyond_a_buffer_is_refused_before_the_library_is_called(name):
    with pytest.raises(ShapeError):
        operations_without_library().grouped_ternary_linear(*refused_calls()[name])


def test_ternary_linear_refuses_the_matrices_of_several_experts():
    with pytest.raises(ShapeError, match="for 2 experts"):
        operations_without_library().ternary_linear(*random_rows(3, 33), tile(random_packed(2, 7, 33, layout="2bit")))
