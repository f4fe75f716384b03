import pytest
import torch
from factories import randomize, tiny_config
from numerics import assert_matches_definition, rms, straight_through_linear

from moe_bitnet.moe import MoELayer
from moe_bitnet.router import mean_router_probabilities, router_z_loss


def make_layer(**changes):
    return randomize(MoELayer(tiny_config(**changes)))


NAMES = ("gate_weight", "up_weight", "down_weight", "norm_weight")


def dense_twin(activation, is_ternary):
    """A feed-forward layer by hand: norm, gate and up, activation, norm, down."""
    linear = straight_through_linear if is_ternary else torch.nn.functional.linear

    def run(x, gain, gate_weight, up_weight, down_weight, norm_weight):
        rows = rms(x, 1e-5) * gain
        gate, up = linear(rows, gate_weight[0]), linear(rows, up_weight[0])
        gate = gate / (1 + (-gate).exp()) if activation == "swiglu" else gate.clamp(min=0).pow(2)
        return [linear(rms(gate * up, 1e-5) * norm_weight[0], down_weight[0])]

    return run


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("precision", ["ternary", "float"])
@pytest.mark.parametrize("num_tokens", [1, 33])
@torch.no_grad()
def test_one_expert_is_a_dense_layer(activation, precision, num_tokens):
    layer = make_layer(num_experts=1, top_k=1, activation=activation, precision=precision)
    x = torch.randn(num_tokens, 12)
    output, statistics = layer(x)
    inputs = [x, layer.norm.weight, *(layer.experts.get_parameter(name) for name in NAMES)]
    assert_matches_definition([output], dense_twin(activation, precision == "ternary"), inputs)
    assert statistics.tokens_per_expert.tolist() == [num_tokens]
    assert statistics.router_probabilities.tolist() == [1]


@torch.no_grad()
def test_a_shared_expert_is_added_for_every_token():
    layer = make_layer(num_shared_experts=1, precision="float")
    x = torch.randn(7, 12)
    with_shared, _ = layer(x)
    routed = layer.experts.run(layer.norm(x), layer.router(layer.norm(x)))
    shared = dense_twin("swiglu", False)
    inputs = [routed, x, layer.norm.weight, *(layer.shared_experts.get_parameter(name) for name in NAMES)]
    assert_matches_definition([with_shared], lambda routed, *rest: [routed + shared(*rest)[0]], inputs)


@torch.no_grad()
def test_several_shared_experts_add_up():
    layer = make_layer(num_shared_experts=3)
    x = torch.randn(7, 12)
    hidden_states = layer.norm(x)
    one_by_one = torch.zeros(7, 12)
    for expert in range(3):
        alone = make_layer(num_shared_experts=1)
        alone.shared_experts.load_state_dict(
            {name: tensor[expert : expert + 1] for name, tensor in layer.shared_experts.state_dict().items()}
        )
        one_by_one += alone.shared_experts.run(hidden_states, alone._visit_all(hidden_states))
    together = layer.shared_experts.run(hidden_states, layer._visit_all(hidden_states))
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=3 * 2**-23 * float(one_by_one.abs().max()))


@torch.no_grad()
def test_statistics_are_those_of_the_router():
    layer, x = make_layer(), torch.randn(33, 12)
    _, statistics = layer(x)
    routing = layer.router(layer.norm(x))
    assert torch.equal(statistics.router_probabilities, mean_router_probabilities(routing))
    assert torch.equal(statistics.router_z_loss, router_z_loss(routing))
    assert torch.equal(statistics.tokens_per_expert, routing.expert_indices.flatten().bincount(minlength=5))
    assert int(statistics.tokens_per_expert.sum()) == 66


@pytest.mark.parametrize("norm_recipe", ["sub_norm", "inner_norm"])
def test_one_norm_serves_router_and_experts_in_both_recipes(norm_recipe):
    names = {name for name, _ in make_layer(norm_recipe=norm_recipe).named_parameters() if "norm" in name}
    assert names == {"norm.weight", "experts.norm_weight"}


def test_an_executor_is_called_once_with_normalized_tokens_and_its_result_is_used():
    layer, x, answer = make_layer(), torch.randn(7, 12), torch.randn(7, 12)
    calls = []

    class Recorder:
        def run(self, hidden_states, routing):
            calls.append((hidden_states, routing))
            return answer

    del layer.experts
    layer.experts = Recorder()
    output, _ = layer(x)
    ((hidden_states, routing),) = calls
    assert torch.equal(output, answer)
    assert torch.equal(hidden_states, layer.norm(x))
    assert routing.expert_indices.shape == (7, 2)
    assert routing.router_logits.shape == (7, 5)
