"""Experts in Triton's interpreter, stage by stage; run by ``test_triton.py`` in a process of its own."""

import dataclasses
import itertools

import numerics
import pytest
import torch
from kernel_variants import offsets_of, random_experts, random_packed, random_rows

from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels import backend_reference as reference
from moe_bitnet.kernels.triton.launches import gate_up
from moe_bitnet.kernels.triton.operations import expert_ffn, normalize_inner
from moe_bitnet.kernels.triton.plan import PAIR_TILES, make_plan
from moe_bitnet.packing import LAYOUTS
from moe_bitnet.tiles import tile

TILES = sorted(set(itertools.chain(*PAIR_TILES.values())), key=lambda each: (each.block_tokens, each.row_blocks))
CASES = [([1], 1, 1), ([1], 130, 161), ([0, 3, 0, 4], 7, 33), ([0, 0, 7], 65, 20), ([2, 33, 5, 0, 1], 33, 65)]
"""Rows of each expert, inner size and hidden size."""


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=["swiglu", "squared_relu"])
def activation(request):
    return request.param


def activated(gate, up, activation):
    if activation == "squared_relu":
        return gate.clamp_min(0).square() * up
    return gate / (1 + torch.exp(-gate)) * up


def inner_of(x_q, scale, experts, offsets, plan=None):
    return gate_up(x_q, scale, experts.gate, experts.up, experts.activation == "squared_relu", offsets, plan)


def assert_inner_is_exact(inner, x_q, scale, experts, offsets):
    """As near to float64 as plain float32 is, from the reference's sums, which are rescaled in float32."""
    gate = reference.grouped_ternary_linear(x_q, scale, experts.gate, offsets)
    up = reference.grouped_ternary_linear(x_q, scale, experts.up, offsets)
    plain = activated(gate, up, experts.activation)
    numerics.assert_close_to_truth(inner, plain, activated(gate.double(), up.double(), experts.activation))


def assert_stages_hold(experts, counts):
    """The inner rows are exact; what follows them is the reference's, from the same integers."""
    offsets = offsets_of(counts)
    x_q, scale = random_rows(sum(counts), experts.gate.in_features)
    scale = scale / experts.gate.in_features  # gates around 1, where a sigmoid is neither 0 nor 1
    inner = inner_of(x_q, scale, experts, offsets)
    assert_inner_is_exact(inner, x_q, scale, experts, offsets)
    inner_q, inner_scale, _ = normalize_inner(inner, experts.norm_weight, experts.norm_eps, offsets)
    output = expert_ffn(x_q, scale, experts, offsets)
    assert output.dtype == torch.float32
    assert torch.equal(output, reference.grouped_ternary_linear(inner_q, inner_scale, experts.down, offsets))
    assert_near_the_reference(output, x_q, scale, experts, offsets, inner_q, inner_scale)


def assert_near_the_reference(output, x_q, scale, experts, offsets, inner_q, inner_scale):
    """Integers are off by one at most, and the output by no more than those and the scale explain."""
    gate = reference.grouped_ternary_linear(x_q, scale, experts.gate, offsets)
    up = reference.grouped_ternary_linear(x_q, scale, experts.up, offsets)
    inner = reference.rms_norm(reference.gated_activation(gate, up, experts.activation), experts.norm_eps)
    expert_of_row = torch.repeat_interleave(offsets.diff())
    expected_q, expected_scale = reference.quantize_activation(inner * experts.norm_weight[expert_of_row])
    flips = (inner_q.int() - expected_q.int()).abs()
    assert int(flips.max()) <= 1
    scale_error = (inner_scale - expected_scale).abs() / expected_scale
    expected = reference.expert_ffn(x_q, scale, experts, offsets)
    weight_scale = experts.down.weight_scale.flatten()[expert_of_row, None]
    explained = flips.sum(-1, keepdim=True) * inner_scale * weight_scale
    explained = explained + (scale_error + 4 * numerics.EPS) * expected.abs()
    assert bool(((output - expected).abs() <= explained).all())


@pytest.mark.parametrize(("counts", "inner_size", "hidden_size"), CASES, ids=str)
def test_stages_hold_for_any_spread_of_rows(layout, activation, counts, inner_size, hidden_size):
    assert_stages_hold(random_experts(len(counts), inner_size, hidden_size, layout, activation), counts)


@pytest.mark.parametrize(("activation", "splits"), [("swiglu", 1), ("squared_relu", 2)])
@pytest.mark.parametrize("each", TILES, ids=str)
def test_gate_and_up_are_exact_with_every_tile_and_split(layout, activation, each, splits):
    counts = [each.block_tokens + 1, 0, 2]
    experts = random_experts(3, 70, 200, layout, activation)
    x_q, scale = random_rows(sum(counts), 200)
    offsets = offsets_of(counts)
    plan = make_plan(
        num_rows=sum(counts), num_experts=3, out_features=70, in_features=200, layout=layout,
        num_multiprocessors=4, is_pair=True, tile=each, num_splits=splits,
    )  # fmt: skip
    assert plan.num_splits == splits
    inner = inner_of(x_q, scale / 200, experts, offsets, plan)
    assert_inner_is_exact(inner, x_q, scale / 200, experts, offsets)


def test_down_may_be_held_in_another_layout(layout, activation):
    experts = random_experts(2, 33, 20, layout, activation)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    mixed = dataclasses.replace(experts, down=random_experts(2, 33, 20, other, activation).down)
    x_q, scale = random_rows(14, 20)
    offsets = offsets_of([1, 13])
    assert torch.equal(expert_ffn(x_q, scale, mixed, offsets), expert_ffn(x_q, scale, experts, offsets))


def test_portable_bytes_are_tiled_on_the_fly(layout):
    x_q, scale = random_rows(3, 20)
    offsets = offsets_of([1, 2])
    tiles, portable = (random_experts(2, 33, 20, layout, form=form) for form in ("tiles", "portable"))
    assert torch.equal(expert_ffn(x_q, scale, portable, offsets), expert_ffn(x_q, scale, tiles, offsets))


def test_no_rows_give_no_rows_and_zeros_give_zeros(layout, activation):
    experts = random_experts(3, 33, 20, layout, activation)
    assert expert_ffn(*random_rows(0, 20), experts, torch.zeros(4, dtype=torch.int64)).shape == (0, 20)
    zeros = torch.zeros(3, 20, dtype=torch.int8)
    assert not expert_ffn(zeros, torch.ones(3, 1), experts, offsets_of([0, 3, 0])).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spares_the_others(activation, value):
    experts, offsets = random_experts(2, 33, 20, "2bit", activation), offsets_of([5, 3])
    x_q, scale = random_rows(8, 20)
    expected = expert_ffn(x_q, scale, experts, offsets)
    for bad in (0, 6):
        spoilt_q, spoilt_scale, keep = x_q.clone(), scale.clone(), torch.arange(8) != bad
        spoilt_q[bad], spoilt_scale[bad] = 0, value
        output = expert_ffn(spoilt_q, spoilt_scale, experts, offsets)
        assert bool(output[bad].isnan().all())
        assert torch.equal(output[keep], expected[keep])


def test_extreme_gates_stay_finite(activation):
    one = tile(random_packed(1, 64, 33, layout="2bit"))
    for gate_scale in (1e-30, 1e-3, 1e3, 1e9):
        x_q, _ = random_rows(3, 33)
        offsets = offsets_of([3])
        inner = gate_up(x_q, torch.full((3, 1), gate_scale), one, one, activation == "squared_relu", offsets)
        assert bool(inner.isfinite().all())


def test_what_does_not_fit_is_refused(layout):
    experts = random_experts(2, 7, 33, layout)
    x_q, scale = random_rows(3, 33)
    offsets = torch.tensor([0, 1, 3])
    other = LAYOUTS[1 - LAYOUTS.index(layout)]

    def refused(arguments, **changes):
        with pytest.raises(ShapeError, match="expert_ffn"):
            expert_ffn(*arguments, dataclasses.replace(experts, **changes), offsets)

    refused((x_q.float(), scale))
    refused(random_rows(3, 34))
    for changes in (
        {"gate": tile(random_packed(3, 7, 33, layout=layout))},
        {"up": tile(random_packed(2, 8, 33, layout=layout))},
        {"up": tile(random_packed(2, 7, 33, layout=other))},
        {"down": tile(random_packed(2, 33, 8, layout=layout))},
        {"norm_weight": torch.ones(2, 8)},
        {"norm_weight": torch.ones(1, 7)},
    ):
        refused((x_q, scale), **changes)
