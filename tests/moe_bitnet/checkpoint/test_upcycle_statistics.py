import pytest
import torch
import torch.nn.functional as F
from factories import random_token_ids
from llama_factory import tiny_llama

from moe_bitnet.checkpoint.upcycle_source import dense_model
from moe_bitnet.checkpoint.upcycle_statistics import collect_statistics
from moe_bitnet.errors import ShapeError


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def dense(llama):
    return dense_model(llama.config.to_dict(), llama.state_dict(), "tiny")


@torch.no_grad()
def rows_of(llama, token_ids, layer):
    """What transformers feeds to o_proj, to its network, and to down_proj; the first token of a sequence left out."""
    heard = {}

    def listen(name, module):
        def hear(_, inputs):
            heard[name] = inputs[0][:, 1:].flatten(0, 1)

        module.register_forward_pre_hook(hear)

    modules = llama.model.layers[layer]
    listen("attention", modules.self_attn.o_proj)
    listen("hidden", modules.mlp)
    listen("inner", modules.mlp.down_proj)
    llama(token_ids)
    return heard


@pytest.mark.parametrize("layer", [0, 1])
def test_gains_are_the_least_squares_ones(llama, dense, layer):
    token_ids = random_token_ids(3, 19)
    statistics = collect_statistics(dense, token_ids)[layer]
    rows = rows_of(llama, token_ids, layer)
    for name, gain in (("attention", statistics.attention_gain), ("inner", statistics.inner_gain)):
        x = rows[name]
        normalized = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        best = torch.stack(
            [torch.linalg.lstsq(normalized[:, [j]], x[:, [j]]).solution[0, 0] for j in range(x.shape[1])]
        )
        assert torch.allclose(gain, best, rtol=1e-3, atol=1e-5)
    assert torch.allclose(statistics.hidden_mean, rows["hidden"].mean(0), atol=1e-5)


def test_the_model_is_left_as_it_was(dense):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    collect_statistics(dense, random_token_ids(1, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


def test_progress_counts_sequences(dense):
    heard = []
    collect_statistics(dense, random_token_ids(3, 5), heard.append)
    assert heard == [1, 2, 3]


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 1), (1, 2, 3)])
def test_other_shapes_are_refused(dense, shape):
    with pytest.raises(ShapeError, match="give \\[B, S\\]"):
        collect_statistics(dense, torch.zeros(shape, dtype=torch.int64))
