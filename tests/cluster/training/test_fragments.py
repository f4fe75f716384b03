import pytest
import torch

from cluster.training.engine import TorchEngine
from cluster.training.fragments import share_of, whole_fragments
from cluster.training.optimizer import set_step_size
from moe_bitnet.model import MoETransformer


@pytest.fixture
def engine(model_config, config):
    torch.manual_seed(0)
    return TorchEngine(MoETransformer(model_config), config)


def train_step(engine):
    engine.backward(engine.forward(torch.arange(12).view(2, 6)).logits.logsumexp(-1).square().mean())
    set_step_size(engine.optimizer, 1e-2, 0.1)
    engine.step()


@pytest.mark.parametrize("num_elements", [0, 1, 7, 33])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_shares_follow_each_other(num_elements, world_size):
    end = 0
    for rank in range(world_size):
        start, count = share_of(num_elements, rank, world_size)
        assert start == end
        end = start + count
    assert end == num_elements


@pytest.mark.parametrize("world_size", [1, 3])
def test_fragments_of_all_workers_restore_another_engine(engine, world_size, model_config, config):
    train_step(engine)
    fragments = [
        fragment
        for rank in range(world_size)
        for fragment in whole_fragments(engine.model, engine.optimizer, rank, world_size)
    ]
    tensors = {fragment.name: torch.full(fragment.shape, torch.nan).flatten() for fragment in fragments}
    assert len(tensors) == 3 * len(list(engine.model.parameters()))
    for fragment in fragments:
        run = tensors[fragment.name][fragment.start : fragment.start + len(fragment.values)]
        assert run.isnan().all(), f"{fragment.name}: written twice"
        run.copy_(fragment.values)
    restored = TorchEngine(MoETransformer(model_config), config)
    restored.load(lambda name, start, count: tensors[name][start : start + count], 1)
    train_step(engine)
    train_step(restored)
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, restored.full_model().state_dict()[name]), name


def test_before_the_first_step_moments_are_zero(engine):
    moments = [
        fragment.values for fragment in engine.fragments() if fragment.name.endswith((".exp_avg", ".exp_avg_sq"))
    ]
    assert len(moments) == 2 * len(list(engine.model.parameters()))
    assert not any(values.any() for values in moments)
