import pytest
import torch

from cluster.training.objective import Objective
from moe_bitnet.model import ModelOutput


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    balance, router_z = (torch.tensor(value, requires_grad=True) for value in (1.5, 4.0))
    targets = torch.randint(11, (3, 5), generator=generator)
    return ModelOutput(logits, balance, router_z, torch.zeros(2, 4, dtype=torch.int64)), targets


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_objective_equals_the_formula(is_compiled):
    output, targets = example()
    terms = Objective(0.01, 0.001, is_compiled)(output, targets)
    logits = output.logits.detach().double()
    picked = logits.softmax(-1).gather(-1, targets.unsqueeze(-1))
    expected = -picked.log().mean()
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.total.double(), expected + 0.01 * 1.5 + 0.001 * 4.0, rtol=1e-6, atol=0)
    terms.total.backward()
    one_hot = torch.nn.functional.one_hot(targets, 11).double()
    torch.testing.assert_close(output.logits.grad.double(), (logits.softmax(-1) - one_hot) / 15, rtol=1e-5, atol=1e-8)
    assert output.load_balance_loss.grad.item() == pytest.approx(0.01)
    assert output.router_z_loss.grad.item() == pytest.approx(0.001)


def test_bfloat16_logits_are_scored_in_float32():
    output, targets = example()
    rounded = ModelOutput(output.logits.bfloat16(), output.load_balance_loss, output.router_z_loss, None)
    expected = torch.nn.functional.cross_entropy(rounded.logits.float().flatten(0, 1), targets.flatten())
    assert torch.equal(Objective(0.0, 0.0)(rounded, targets).loss, expected)
