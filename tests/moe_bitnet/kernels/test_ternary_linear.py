"""``ternary_linear`` and ``grouped_ternary_linear``: exact integers, whatever the backend."""

import numpy as np
import pytest
import torch
from factories import backends_with
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels import select
from moe_bitnet.kernels.backend_reference import MAX_IN_FEATURES
from moe_bitnet.packing import LAYOUTS, PackedTernary, pack


@pytest.fixture(params=backends_with("ternary_linear"), scope="module")
def linear(request):
    return select("ternary_linear", "cpu", request.param)


@pytest.fixture(params=backends_with("grouped_ternary_linear"), scope="module")
def grouped(request):
    return select("grouped_ternary_linear", "cpu", request.param)


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


def random_case(num_rows, in_features, out_features, layout, seed=0, num_experts=None):
    generator = torch.Generator().manual_seed(seed)
    leading = () if num_experts is None else (num_experts,)
    x_q = torch.randint(-128, 128, (num_rows, in_features), generator=generator, dtype=torch.int8)
    ternary = torch.randint(-1, 2, (*leading, out_features, in_features), generator=generator, dtype=torch.int8)
    activation_scale = torch.rand(num_rows, 1, generator=generator) + 1e-3
    weight_scale = torch.rand(*leading, 1, 1, generator=generator) + 1e-3
    return x_q, activation_scale, ternary, PackedTernary(pack(ternary, layout), weight_scale, in_features, layout)


def oracle(x_q, activation_scale, ternary, weight_scale):
    """Integer sums in int64; one float32 product of the scales, one rescale."""
    sums = x_q.numpy().astype(np.int64) @ ternary.numpy().astype(np.int64).T
    assert np.abs(sums).max(initial=0) < 2**24, "float32 counts every integer below"
    return torch.from_numpy(sums.astype(np.float32)) * (activation_scale * weight_scale)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 33),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 33),
    seed=st.integers(0, 2**31),
)
def test_equals_the_integer_oracle(linear, layout, num_rows, in_features, out_features, seed):
    x_q, scale, ternary, weight = random_case(num_rows, in_features, out_features, layout, seed)
    output = linear(x_q, scale, weight)
    assert output.dtype == torch.float32
    assert torch.equal(output, oracle(x_q, scale, ternary, weight.weight_scale))


@pytest.mark.parametrize("in_features", [127, 128, 129, 1000, 4099])
def test_long_rows_are_exact(linear, layout, in_features):
    x_q, scale, ternary, weight = random_case(3, in_features, 7, layout)
    assert torch.equal(linear(x_q, scale, weight), oracle(x_q, scale, ternary, weight.weight_scale))


@pytest.mark.parametrize("in_features", [1, 7, 33, 256, 4099, MAX_IN_FEATURES])
@pytest.mark.parametrize("x_value", [-128, 127])
@pytest.mark.parametrize("weight_value", [-1, 1])
def test_extreme_sums_do_not_overflow(linear, layout, in_features, x_value, weight_value):
    x_q = torch.full((1, in_features), x_value, dtype=torch.int8)
    ternary = torch.full((1, in_features), weight_value, dtype=torch.int8)
    weight = PackedTernary(pack(ternary, layout), torch.ones(1, 1), in_features, layout)
    assert linear(x_q, torch.ones(1, 1), weight).item() == x_value * weight_value * in_features


def test_reference_refuses_rows_that_float32_cannot_sum_exactly(layout):
    assert 128 * MAX_IN_FEATURES < 2**24 <= 128 * (MAX_IN_FEATURES + 1), "beyond, an odd sum may lie between two floats"
    in_features = MAX_IN_FEATURES + 1
    ternary = torch.ones(1, in_features, dtype=torch.int8)
    weight = PackedTernary(pack(ternary, layout), torch.ones(1, 1), in_features, layout)
    with pytest.raises(ShapeError, match=f"{in_features} inputs exceed {MAX_IN_FEATURES}"):
        select("ternary_linear", "cpu", "reference")(
            torch.ones(1, in_features, dtype=torch.int8), torch.ones(1), weight
        )


def test_zeros_give_zeros(linear, layout):
    x_q, scale, ternary, weight = random_case(3, 33, 7, layout)
    assert not linear(torch.zeros_like(x_q), scale, weight).any()
    zero = PackedTernary(pack(torch.zeros_like(ternary), layout), weight.weight_scale, 33, layout)
    assert not linear(x_q, scale, zero).any()


def test_no_rows_give_no_rows(linear, grouped, layout):
    x_q, scale, _, weight = random_case(0, 33, 7, layout)
    assert linear(x_q, scale, weight).shape == (0, 7)
    x_q, scale, _, weight = random_case(0, 33, 7, layout, num_experts=3)
    assert grouped(x_q, scale, weight, torch.zeros(4, dtype=torch.int64)).shape == (0, 7)


@pytest.mark.parametrize("wrong", [31, 32, 34, 36])
def test_other_inner_sizes_are_refused(linear, grouped, layout, wrong):
    _, _, _, weight = random_case(3, 33, 7, layout)
    x_q, scale, _, _ = random_case(3, wrong, 7, layout)
    with pytest.raises(ShapeError, match=f"{wrong} features.*packed for 33"):
        linear(x_q, scale, weight)
    _, _, _, experts = random_case(3, 33, 7, layout, num_experts=2)
    with pytest.raises(ShapeError, match=f"{wrong} features.*packed for 33"):
        grouped(x_q, scale, experts, torch.tensor([0, 1, 3]))


COUNTS = [[1], [33], [0, 3, 0, 4], [1, 1, 1], [0, 0, 7], [7, 0, 0], [0, 0], [2, 31, 5, 0, 1]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 33), (33, 7), (64, 16)])
def test_grouped_equals_the_oracle_one_by_one(grouped, linear, layout, counts, in_features, out_features):
    num_rows, num_experts = sum(counts), len(counts)
    x_q, scale, ternary, weight = random_case(num_rows, in_features, out_features, layout, num_experts=num_experts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    output = grouped(x_q, scale, weight, offsets)
    assert output.dtype == torch.float32
    assert output.shape == (num_rows, out_features)
    for expert in range(num_experts):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        one_scale = weight.weight_scale[expert]
        one = PackedTernary(weight.weight_packed[expert], one_scale, in_features, layout)
        assert torch.equal(output[rows], oracle(x_q[rows], scale[rows], ternary[expert], one_scale))
        assert torch.equal(output[rows], linear(x_q[rows], scale[rows], one))


def test_both_layouts_give_the_same_bits(linear):
    outputs = []
    for layout in LAYOUTS:
        x_q, scale, _, weight = random_case(7, 33, 20, layout)
        outputs.append(linear(x_q, scale, weight))
    assert torch.equal(outputs[0], outputs[1])
