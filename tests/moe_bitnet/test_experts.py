import pytest
import torch
from factories import randomize, tiny_config
from numerics import assert_matches_definition, rms, straight_through_linear, with_gradients

from moe_bitnet.dispatch import sort_by_expert
from moe_bitnet.experts import (
    BitExperts,
    FloatExperts,
    PackedExperts,
    build_experts,
    gated_activation,
    grouped_matmul,
)
from moe_bitnet.packing import LAYOUTS
from moe_bitnet.router import Routing

EPS = 1e-5
WEIGHTS = ("gate_weight", "up_weight", "down_weight", "norm_weight")


@pytest.fixture(params=["swiglu", "squared_relu"])
def activation(request):
    return request.param


@pytest.fixture(params=["ternary", "float"])
def precision(request):
    return request.param


def make_routing(expert_indices, num_experts):
    weights = torch.rand(expert_indices.shape, generator=torch.Generator().manual_seed(3)) + 0.1
    return Routing(expert_indices, weights, torch.zeros(len(expert_indices), num_experts))


def routing_that_avoids(expert, num_experts, num_tokens=9, top_k=2):
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(2))
    scores[:, expert] = -1
    return make_routing(scores.topk(top_k).indices, num_experts)


ROUTINGS = {
    "one expert": make_routing(torch.zeros(7, 1, dtype=torch.int64), 1),
    "one token": make_routing(torch.tensor([[3, 1]]), 5),
    "an expert without tokens": routing_that_avoids(2, 5),
    "the last expert without tokens": routing_that_avoids(4, 5),
    "all experts for all tokens": make_routing(torch.tensor([[2, 0, 1], [0, 1, 2]]), 3),
    "one of many takes all": make_routing(torch.full((33, 1), 1), 3),
}


def loop_over_tokens(routing, activation, is_ternary):
    """The definition: one token, one expert, one vector at a time."""

    def linear(x, weight):
        return straight_through_linear(x, weight) if is_ternary else x @ weight.T

    def run(hidden_states, expert_weights, gate_weight, up_weight, down_weight, norm_weight):
        outputs = []
        for token, x in enumerate(hidden_states):
            output = torch.zeros_like(x)
            for choice, expert in enumerate(routing.expert_indices[token].tolist()):
                gate, up = linear(x, gate_weight[expert]), linear(x, up_weight[expert])
                gate = gate / (1 + (-gate).exp()) if activation == "swiglu" else gate.clamp(min=0) ** 2
                inner = rms(gate * up, EPS) * norm_weight[expert]
                output = output + linear(inner, down_weight[expert]) * expert_weights[token, choice]
            outputs.append(output)
        return torch.stack(outputs)

    return run


@pytest.mark.parametrize("name", ROUTINGS)
def test_output_and_all_gradients_equal_a_loop_over_tokens(name, activation, precision):
    routing = ROUTINGS[name]
    num_experts = routing.router_logits.shape[-1]
    config = tiny_config(activation=activation, precision=precision, norm_eps=EPS)
    experts = randomize(build_experts(config, num_experts))
    x = torch.randn(len(routing.expert_indices), 12, requires_grad=True)
    weights = routing.expert_weights.clone().requires_grad_()
    upstream = torch.randn(len(x), 12)
    output = experts.run(x, Routing(routing.expert_indices, weights, routing.router_logits))
    assert output.dtype == torch.float32
    output.backward(upstream)
    inputs = [x, weights, *(experts.get_parameter(name) for name in WEIGHTS)]
    definition = with_gradients(loop_over_tokens(routing, activation, precision == "ternary"), upstream)
    assert_matches_definition([output, *(leaf.grad for leaf in inputs)], definition, inputs)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros(precision):
    experts = randomize(build_experts(tiny_config(precision=precision), 5))
    experts.run(torch.randn(9, 12), routing_that_avoids(2, 5)).sum().backward()
    for name in WEIGHTS:
        gradient = experts.get_parameter(name).grad
        assert not gradient[2].any()
        assert all(gradient[expert].any() for expert in (0, 1, 3, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("is_arranged", [False, True])
@torch.no_grad()
def test_packed_experts_equal_the_latent_ones_bit_for_bit(name, layout, activation, is_arranged):
    # Without gradients both round the sigmoid and the norm's factor once, so wherever a value lies in memory and in
    # whatever order a sum runs, the int8 values after them are the same.
    routing = ROUTINGS[name]
    num_experts = routing.router_logits.shape[-1]
    config = tiny_config(activation=activation, norm_eps=EPS)
    experts = randomize(BitExperts(config, num_experts))
    packed = PackedExperts.from_experts(experts, config, layout)
    if is_arranged:
        packed.arrange_weights()
    x = torch.randn(len(routing.expert_indices), 12)
    assert torch.equal(packed.run(x, routing), experts.run(x, routing))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROUTINGS)
@torch.no_grad()
def test_packed_experts_are_as_near_to_the_truth_as_the_plain_loop(name, layout, activation):
    routing = ROUTINGS[name]
    num_experts = routing.router_logits.shape[-1]
    config = tiny_config(activation=activation, norm_eps=EPS)
    experts = randomize(BitExperts(config, num_experts))
    packed = PackedExperts.from_experts(experts, config, layout)
    x = torch.randn(len(routing.expert_indices), 12)

    definition = loop_over_tokens(routing, activation, True)
    inputs = [x, routing.expert_weights, *(experts.get_parameter(name) for name in WEIGHTS)]
    assert_matches_definition([packed.run(x, routing)], lambda *inputs: [definition(*inputs)], inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_travelled_as_int8_give_the_same_bits(layout):
    # what a remote host does: prepared rows arrive, and only the host's own experts compute
    routing = routing_that_avoids(2, 5)
    config = tiny_config()
    packed = PackedExperts.from_experts(randomize(BitExperts(config, 5)), config, layout)
    x = torch.randn(9, 12)
    dispatch = sort_by_expert(routing.expert_indices, 5)
    rows = packed.prepare(x).take(dispatch.sorted_token_indices)
    assert rows.rows.dtype == torch.int8
    late = packed.prepare(x[dispatch.sorted_token_indices])
    assert torch.equal(rows.rows, late.rows)
    assert torch.equal(rows.activation_scale, late.activation_scale)


def test_gated_activations_equal_their_formulas():
    gate, up = torch.randn(7, 33, dtype=torch.float64), torch.randn(7, 33, dtype=torch.float64)
    torch.testing.assert_close(gated_activation(gate, up, "swiglu"), gate / (1 + (-gate).exp()) * up)
    torch.testing.assert_close(gated_activation(gate, up, "squared_relu"), gate.clamp(min=0) ** 2 * up)


def test_the_config_decides_the_kind_of_experts():
    assert type(build_experts(tiny_config(), 3)) is BitExperts
    assert type(build_experts(tiny_config(precision="float"), 3)) is FloatExperts
    packed = build_experts(tiny_config(), 3, "base3")
    assert type(packed) is PackedExperts
    assert packed.num_experts == 3
    assert packed.layout == "base3"


@pytest.mark.parametrize("counts", [[5], [0, 3, 0, 4], [1, 1, 1], [0, 0, 7]])
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 33), (8, 16)])
def test_grouped_matmul_equals_one_matmul_an_expert(counts, in_features, out_features):
    rows = torch.randn(sum(counts), in_features)
    weight = torch.randn(len(counts), out_features, in_features)
    offsets = torch.tensor([0, *counts]).cumsum(0)

    def loop(rows, weight):
        return [torch.cat([part @ matrix.T for part, matrix in zip(rows.split(counts), weight, strict=True)])]

    assert_matches_definition([grouped_matmul(rows, weight, offsets)], loop, [rows, weight])


def test_grouped_matmul_follows_autocast():
    rows, weight, offsets = torch.randn(7, 33), torch.randn(2, 5, 33), torch.tensor([0, 3, 7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = grouped_matmul(rows, weight, offsets)
    rounded = [x.bfloat16() for x in (rows, weight)]
    plain = torch.cat([rounded[0][:3] @ rounded[1][0].T, rounded[0][3:] @ rounded[1][1].T])
    truth = torch.cat([rounded[0][:3].double() @ rounded[1][0].double().T,
                       rounded[0][3:].double() @ rounded[1][1].double().T])  # fmt: skip
    assert actual.dtype == torch.float32
    # two ulps of bfloat16 (8 bits) rather than float32
    allowed = float((plain.double() - truth).abs().max() + 2 * truth.abs().max() * 2**-8)
    assert (actual - truth).abs().max() <= allowed
    assert torch.equal(actual, actual.bfloat16().float()), "the result passed through bfloat16"


def test_half_precision_weights_are_taken_for_inference():
    experts = randomize(FloatExperts(tiny_config(precision="float"), 5))
    for name in ("gate_weight", "up_weight", "down_weight"):
        getattr(experts, name).data = getattr(experts, name).data.half()
    wide = FloatExperts(tiny_config(precision="float"), 5)
    wide.load_state_dict({name: tensor.float() for name, tensor in experts.state_dict().items()})
    x, routing = torch.randn(9, 12), routing_that_avoids(2, 5)
    assert torch.equal(experts.run(x, routing), wide.run(x, routing))
