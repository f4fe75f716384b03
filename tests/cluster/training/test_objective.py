import pytest
import torch

from cluster.training.objective import Objective
from moe_bitnet.model import ModelOutput


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    probabilities = torch.rand(2, 4, generator=generator).softmax(-1).requires_grad_()
    router_z = torch.tensor(4.0, requires_grad=True)
    targets = torch.randint(11, (3, 5), generator=generator)
    return ModelOutput(logits, probabilities, router_z, torch.randint(9, (2, 4), generator=generator)), targets


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_objective_equals_the_formula(is_compiled):
    output, targets = example()
    objective = Objective(0.01, 0.001, is_compiled)
    score = objective.score(output, targets)
    of_all_workers = output.tokens_per_expert + torch.tensor([[3, 0, 1, 0]])
    total = objective.total(score, of_all_workers)
    logits = output.logits.detach().double()
    picked = logits.softmax(-1).gather(-1, targets.unsqueeze(-1))
    expected = -picked.log().mean()
    assert score.loss.dtype == total.dtype == torch.float32
    torch.testing.assert_close(score.loss.double(), expected, rtol=1e-6, atol=0)
    share = of_all_workers.double() / of_all_workers.sum(1, keepdim=True)
    balance = 4 * (share * output.router_probabilities.detach().double()).sum(1).mean()
    torch.testing.assert_close(total.double(), expected + 0.01 * balance + 0.001 * 4.0, rtol=1e-6, atol=0)
    total.backward()
    one_hot = torch.nn.functional.one_hot(targets, 11).double()
    torch.testing.assert_close(output.logits.grad.double(), (logits.softmax(-1) - one_hot) / 15, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(output.router_probabilities.grad.double(), 0.01 * 4 * share / 2, rtol=1e-6, atol=0)
    assert output.router_z_loss.grad.item() == pytest.approx(0.001)


def test_bfloat16_logits_are_scored_in_float32():
    output, targets = example()
    rounded = ModelOutput(output.logits.bfloat16(), output.router_probabilities, output.router_z_loss, None)
    expected = torch.nn.functional.cross_entropy(rounded.logits.float().flatten(0, 1), targets.flatten())
    assert torch.equal(Objective(0.0, 0.0).score(rounded, targets).loss, expected)
