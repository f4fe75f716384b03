"""``expert_ffn``: the fused experts give the bits of the reference, which does one step after the other."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import (
    FORMS,
    computing_with,
    equal_with_nan,
    offsets_of,
    operations_without_library,
    random_experts,
    random_packed,
    random_rows,
    torch_threads,
    variants_with,
)

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.backend_reference import expert_ffn as reference
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import LAYOUTS, PackedTernary, pack
from moe_bitnet.tiles import tile

ACTIVATIONS = ("swiglu", "squared_relu")
COUNTS = [[1], [14], [0, 3, 0, 4], [0, 0, 7], [7, 0, 0], [1, 1, 1], [2, 31, 5, 0, 1]]


@pytest.fixture(params=variants_with("expert_ffn"), scope="module", ids=str)
def expert_ffn(request):
    with computing_with(request.param) as variant:
        yield variant.select("expert_ffn")


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


@pytest.fixture(params=ACTIVATIONS, scope="module")
def activation(request):
    return request.param


def assert_equals_the_reference(expert_ffn, experts, counts, seed=0):
    x_q, scale = random_rows(sum(counts), experts.gate.in_features, seed)
    offsets = offsets_of(counts)
    output = expert_ffn(x_q, scale, experts, offsets)
    assert output.dtype == torch.float32
    assert output.shape == (sum(counts), experts.down.out_features)
    assert torch.equal(output, reference(x_q, scale, experts, offsets))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference_bit_for_bit(expert_ffn, layout, activation, form, counts):
    for inner_size, hidden_size in [(1, 1), (7, 33), (65, 20), (64, 64), (130, 21)]:
        experts = random_experts(len(counts), inner_size, hidden_size, layout, activation, form)
        assert_equals_the_reference(expert_ffn, experts, counts)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(0, 15), min_size=1, max_size=5),
    inner_size=st.integers(1, 140),
    hidden_size=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference_however_rows_are_spread(
    expert_ffn, layout, activation, counts, inner_size, hidden_size, seed
):
    experts = random_experts(len(counts), inner_size, hidden_size, layout, activation, seed=seed)
    assert_equals_the_reference(expert_ffn, experts, counts, seed)


def test_every_number_of_rows_is_computed_alike(expert_ffn, layout, activation):
    # a row's result may not depend on which rows stand beside it
    experts, offsets_of_one = random_experts(1, 33, 20, layout, activation), offsets_of([1])
    x_q, scale = random_rows(14, 20)
    rows = [expert_ffn(x_q[i : i + 1], scale[i : i + 1], experts, offsets_of_one) for i in range(14)]
    for count in range(1, 15):
        together = expert_ffn(x_q[:count], scale[:count], experts, offsets_of([count]))
        assert torch.equal(together, torch.cat(rows[:count]))


def test_down_may_be_held_in_another_layout(expert_ffn, layout, activation):
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    experts = random_experts(2, 33, 20, layout, activation)
    mixed = dataclasses.replace(experts, down=random_experts(2, 33, 20, other, activation).down)
    x_q, scale = random_rows(14, 20)
    for counts in ([1, 0], [1, 13]):
        rows, offsets = slice(sum(counts)), offsets_of(counts)
        output = expert_ffn(x_q[rows], scale[rows], mixed, offsets)
        assert torch.equal(output, expert_ffn(x_q[rows], scale[rows], experts, offsets))


def test_no_rows_give_no_rows(expert_ffn, layout, activation):
    experts = random_experts(3, 33, 20, layout, activation)
    assert expert_ffn(*random_rows(0, 20), experts, torch.zeros(4, dtype=torch.int64)).shape == (0, 20)


def test_rows_of_zeros_give_zeros(expert_ffn, layout, activation):
    experts = random_experts(1, 33, 20, layout, activation)
    assert not expert_ffn(torch.zeros(3, 20, dtype=torch.int8), torch.ones(3, 1), experts, offsets_of([3])).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spares_the_others(expert_ffn, layout, activation, value):
    # what quantize_activation gives for such a row: that scale and integers of 0
    experts, offsets = random_experts(2, 33, 20, layout, activation), offsets_of([5, 3])
    x_q, scale = random_rows(8, 20)
    expected = expert_ffn(x_q, scale, experts, offsets)
    for bad in (0, 3, 6):
        spoilt_q, spoilt_scale, keep = x_q.clone(), scale.clone(), torch.arange(8) != bad
        spoilt_q[bad], spoilt_scale[bad] = 0, value
        output = expert_ffn(spoilt_q, spoilt_scale, experts, offsets)
        assert bool(output[bad].isnan().all())
        assert torch.equal(output[keep], expected[keep])


def scalar_experts(activation):
    """One expert of 1 x 1 matrices whose output is nearly the bits of activation(gate) · up.

    An enormous epsilon turns the norm's factor into a power of two, which the gain takes back; the quantization of a
    single value is 127 times its scale.
    """
    one = tile(PackedTernary(pack(torch.ones(1, 1, 1, dtype=torch.int8), "2bit"), torch.ones(1, 1, 1), 1, "2bit"))
    return ExpertWeights(one, one, one, torch.full((1, 1), 2.0**40), 2.0**80, activation)


def gated(expert_ffn, gate, activation):
    """What the experts make of arbitrary gates, given as scales of rows of a single 1."""
    x_q = torch.ones(len(gate), 1, dtype=torch.int8)
    return expert_ffn(x_q, gate[:, None], scalar_experts(activation), offsets_of([len(gate)]))[:, 0]


def test_the_gates_of_these_tests_reach_the_output(expert_ffn):
    gate = torch.tensor([1.0, 2.0, -3.0, 0.5])
    expected = gate * torch.sigmoid(gate) * gate
    torch.testing.assert_close(gated(expert_ffn, gate, "swiglu"), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gated(expert_ffn, gate, "squared_relu"), gate.clamp_min(0) ** 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("largest", [1e-3, 1.0, 10.0, 90.0, 800.0])
def test_gates_of_any_size_equal_the_reference(expert_ffn, activation, largest):
    gate = (torch.rand(10_000) * 2 - 1) * largest
    assert torch.equal(gated(expert_ffn, gate, activation), gated(reference, gate, activation))


def test_extreme_gates_equal_the_reference(expert_ffn, activation):
    # exp overflows float32 beyond 88 and float64 beyond 709, a sigmoid becomes denormal below -87 and 0 below -104
    sizes = [0.0, 1e-45, 1e-38, 87.0, 88.0, 89.0, 103.9, 104.0, 707.9, 708.0, 709.0, 710.0, 745.0, 746.0, 1e4, 3e38]
    values = [sign * size for size in [*sizes, float("inf")] for sign in (1, -1)]
    gate = torch.tensor([*values, float("nan"), *values])
    output = gated(expert_ffn, gate, activation)
    assert equal_with_nan(output, gated(reference, gate, activation))
    finite = output[: 2 * len(sizes)][gate[: 2 * len(sizes)].abs() <= 1e4]
    assert bool(finite.isfinite().all()), "a finite gate has a finite result"


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(expert_ffn, layout, activation, num_threads):
    # large enough that the work is worth three threads
    experts = random_experts(5, 210, 300, layout, activation)
    with torch_threads(num_threads):
        for counts in ([0, 1, 14, 0, 6], [40, 0, 0, 0, 0]):
            assert_equals_the_reference(expert_ffn, experts, counts)


def refused_calls():
    experts = random_experts(2, 7, 33, "2bit")
    x_q, scale = random_rows(3, 33)
    offsets = torch.tensor([0, 1, 3])

    def with_matrix(**changes):
        return (x_q, scale, dataclasses.replace(experts, **changes), offsets)

    def matrix(*shape, layout="2bit"):
        return tile(random_packed(*shape, layout=layout))

    return {
        "x is not int8": (x_q.float(), scale, experts, offsets),
        "x of other features": (*random_rows(3, 34), experts, offsets),
        "too few scales": (x_q, scale[:2], experts, offsets),
        "offsets that fall": (x_q, scale, experts, torch.tensor([0, 4, 3])),
        "offsets beyond the rows": (x_q, scale, experts, torch.tensor([0, 1, 4])),
        "too few offsets": (x_q, scale, experts, torch.tensor([0, 3])),
        "gate of another number of experts": with_matrix(gate=matrix(3, 7, 33)),
        "up of other outputs": with_matrix(up=matrix(2, 8, 33)),
        "up of other inputs": with_matrix(up=matrix(2, 7, 32)),
        "up in another layout": with_matrix(up=matrix(2, 7, 33, layout="base3")),
        "down of other inputs": with_matrix(down=matrix(2, 33, 8)),
        "down of another number of experts": with_matrix(down=matrix(1, 33, 7)),
        "a norm of another length": with_matrix(norm_weight=torch.ones(2, 8)),
        "a norm for fewer experts": with_matrix(norm_weight=torch.ones(1, 7)),
        "a norm without experts": with_matrix(norm_weight=torch.ones(7)),
        "tiles cut short": with_matrix(
            gate=dataclasses.replace(experts.gate, tiles=experts.gate.tiles[..., :-1].contiguous())
        ),
    }


@pytest.mark.parametrize("name", refused_calls())
def test_what_would_read_beyond_a_buffer_is_refused_before_the_library_is_called(name):
    with pytest.raises(ShapeError):
        operations_without_library().expert_ffn(*refused_calls()[name])
