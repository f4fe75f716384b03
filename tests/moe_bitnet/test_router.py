import pytest
import torch

from moe_bitnet.router import (
    Router,
    Routing,
    count_tokens_per_expert,
    load_balance_loss,
    mean_router_probabilities,
    router_z_loss,
)


def make_router(hidden_size=7, num_experts=5, top_k=2):
    router = Router(hidden_size, num_experts, top_k)
    router.weight.data.normal_()
    return router


def routing_from(router_logits, top_k=1):
    top_logits, indices = router_logits.topk(top_k, dim=-1)
    return Routing(indices, top_logits.softmax(-1), router_logits)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 1), (5, 2), (7, 7)])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_each_token_visits_different_experts_with_weights_that_sum_to_one(num_experts, top_k, num_tokens):
    routing = make_router(7, num_experts, top_k)(torch.randn(num_tokens, 7))
    assert routing.expert_indices.shape == routing.expert_weights.shape == (num_tokens, top_k)
    assert routing.router_logits.shape == (num_tokens, num_experts)
    assert routing.expert_indices.dtype == torch.int64
    assert all(len(set(row)) == top_k for row in routing.expert_indices.tolist())
    assert (routing.expert_weights.double().sum(-1) - 1).abs().max() <= top_k * torch.finfo(torch.float32).eps


def test_the_best_experts_are_chosen_best_first():
    routing = make_router()(torch.randn(33, 7))
    expected = routing.router_logits.argsort(dim=-1, descending=True)[:, :2]
    assert torch.equal(routing.expert_indices, expected)
    assert (routing.expert_weights[:, 0] >= routing.expert_weights[:, 1]).all()


def test_weights_are_the_softmax_over_all_renormalized_over_the_chosen():
    routing = make_router()(torch.randn(33, 7))
    chosen = routing.router_logits.double().softmax(-1).gather(-1, routing.expert_indices)
    expected = chosen / chosen.sum(-1, keepdim=True)
    # the exponent is rounded once, the exponential, the sum and the quotient once or twice each
    largest_logit = float(routing.router_logits.detach().abs().max())
    assert (routing.expert_weights - expected).abs().max() <= (2 * largest_logit + 4) * torch.finfo(torch.float32).eps


def test_router_is_float32_under_autocast():
    router, x = make_router(), torch.randn(33, 7)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = router(x)
    assert actual.router_logits.dtype == actual.expert_weights.dtype == torch.float32
    assert torch.equal(actual.router_logits, expected.router_logits)
    assert torch.equal(actual.expert_indices, expected.expert_indices)


def test_gradients_reach_the_router():
    router, x = make_router(), torch.randn(7, 7, requires_grad=True)
    (router(x).expert_weights * torch.randn(7, 2)).sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_visits_are_counted():
    indices = torch.tensor([[0, 2], [2, 4], [2, 0]])
    assert count_tokens_per_expert(indices, 6).tolist() == [2, 0, 3, 0, 1, 0]
    assert count_tokens_per_expert(indices[:0], 3).tolist() == [0, 0, 0]


def balance(*routings):
    """Return the loss of a batch that consists of parts, each on a worker of its own."""
    num_experts = routings[0].router_logits.shape[-1]
    visits = sum(count_tokens_per_expert(routing.expert_indices, num_experts) for routing in routings)
    return sum(load_balance_loss(mean_router_probabilities(part), visits) for part in routings) / len(routings)


@pytest.mark.parametrize("num_experts", [1, 5, 7])
def test_load_balance_loss_is_one_for_a_uniform_router(num_experts):
    uniform = routing_from(torch.zeros(33, num_experts))
    assert float(balance(uniform)) == pytest.approx(1, abs=1e-6)
    each_its_own = routing_from(torch.eye(num_experts).repeat(3, 1) * 100)
    assert float(balance(each_its_own)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num_experts", [1, 5, 7])
def test_load_balance_loss_is_the_number_of_experts_if_one_takes_all(num_experts):
    logits = torch.zeros(33, num_experts)
    logits[:, -1] = 100
    assert float(balance(routing_from(logits))) == pytest.approx(num_experts, rel=1e-6)


def test_load_balance_loss_equals_its_formula_and_has_a_gradient_through_probabilities_alone():
    logits = torch.randn(33, 5, requires_grad=True)
    routing = routing_from(logits, top_k=2)
    loss = balance(routing)
    share = torch.stack([(routing.expert_indices == e).double().sum() / 66 for e in range(5)])
    twin = logits.detach().double().requires_grad_()
    expected = 5 * (share * twin.softmax(-1).mean(0)).sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    loss.backward()
    expected.backward()
    assert (logits.grad - twin.grad).abs().max() <= 1e-6 * twin.grad.abs().max()


@pytest.mark.parametrize("num_parts", [2, 3])
def test_load_balance_loss_and_its_gradient_are_those_of_the_whole_batch(num_parts):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    whole = balance(routing_from(logits, top_k=2))
    parts = balance(*(routing_from(part, top_k=2) for part in logits.chunk(num_parts)))
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    of_whole, of_parts = (torch.autograd.grad(loss, logits)[0] for loss in (whole, parts))
    torch.testing.assert_close(of_parts, of_whole, rtol=1e-12, atol=1e-15)


def test_load_balance_loss_of_several_layers_is_their_mean():
    probabilities, visits = torch.randn(3, 5).softmax(-1), torch.randint(1, 9, (3, 5))
    each = [float(load_balance_loss(*layer)) for layer in zip(probabilities, visits, strict=True)]
    assert float(load_balance_loss(probabilities, visits)) == pytest.approx(sum(each) / 3, rel=1e-6)


def test_z_loss_equals_its_formula():
    logits = torch.randn(33, 5) * 3
    expected = logits.double().exp().sum(-1).log().square().mean()
    assert float(router_z_loss(routing_from(logits))) == pytest.approx(float(expected), rel=1e-6)


def test_z_loss_survives_large_logits():
    assert float(router_z_loss(routing_from(torch.full((3, 1), 1000.0)))) == 1e6
