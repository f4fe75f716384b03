import pytest
import torch
from moment_factories import NUM_TOKENS, moments_of, skewed_tokens

from kvcache.moments import Moments
from kvcache.old_attention import old_attention
from moe_bitnet.errors import CheckpointError, ShapeError

SCALING = 0.02


def attended_moments(*tokens):
    moments = moments_of(*tokens)
    for layer_index in range(2):
        moments.add_attended(layer_index, *tokens, SCALING)
    return moments


def test_moments_of_two_halves_are_those_of_the_whole():
    query, key, value = skewed_tokens()
    whole = moments_of(query, key, value)
    halves = Moments.zeros(2, 2, 64)
    for layer_index in range(2):
        for part in (slice(0, 500), slice(500, None)):
            halves.add(layer_index, query[part], key[part], value[part])
    for name, total in vars(whole).items():
        torch.testing.assert_close(getattr(halves, name), total)


def test_attention_of_two_chunks_is_that_of_the_whole():
    query, key, value = skewed_tokens()
    whole, chunks = attended_moments(query, key, value), moments_of(query, key, value)
    for layer_index in range(2):
        for start, end in ((0, 500), (500, NUM_TOKENS)):
            chunks.add_attended(layer_index, query[start:end], key[:end], value[:end], SCALING)
    for name, total in vars(whole).items():
        # weights are float32, and terms of both signs cancel: errors are as large as the largest sums have them
        torch.testing.assert_close(getattr(chunks, name), total, rtol=0, atol=2e-6 * float(total.abs().max()))


@pytest.mark.parametrize("name", ["key", "value"])
def test_means_follow_attention_by_half(name):
    query, key, value = skewed_tokens()
    x = {"key": key, "value": value}[name].double().transpose(0, 1)  # [G, T, D]
    weights = old_attention(query.transpose(0, 1), key.transpose(0, 1), SCALING).received.double().unsqueeze(2)
    weights = weights / weights.sum(dim=1, keepdim=True) / 2 + 1 / (2 * NUM_TOKENS)
    moments = attended_moments(query, key, value)
    torch.testing.assert_close(moments.mean(f"{name}_sum", 1), (weights * x).sum(dim=1))
    torch.testing.assert_close(moments.mean(f"{name}_square", 1), (weights * x).mT @ x)


def test_queries_count_by_the_attention_that_they_give():
    query, key, value = skewed_tokens()
    given = old_attention(query.transpose(0, 1), key.transpose(0, 1), SCALING).given.double()  # [N, T]
    heads = query.double().transpose(0, 1)
    squares = (given.unsqueeze(2) * heads).mT @ heads  # [N, D, D]
    torch.testing.assert_close(
        attended_moments(query, key, value).attended_query_square[0], squares.view(2, 3, 64, 64).sum(dim=1)
    )


def test_without_old_tokens_all_count_alike():
    query, key, value = (x[:256] for x in skewed_tokens())
    moments = attended_moments(query, key, value)
    assert moments.attended_weight.sum() == 0
    torch.testing.assert_close(moments.mean("value_sum", 0), value.double().mean(dim=0))


def test_file_brings_the_moments_back(tmp_path):
    moments = attended_moments(*skewed_tokens())
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    for name, total in vars(moments).items():
        assert torch.equal(getattr(loaded, name), total.float().double())


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        Moments.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors here, but long enough to have a header")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Moments.load(tmp_path / "text")


def test_tokens_of_another_shape_are_refused():
    tokens = (torch.zeros(1, 3, 64), torch.zeros(1, 2, 64), torch.zeros(1, 2, 64))
    with pytest.raises(ShapeError, match=r"Moments\.add:"):
        Moments.zeros(2, 2, 64).add(0, *tokens)
    with pytest.raises(ShapeError, match=r"Moments\.add_attended"):
        Moments.zeros(2, 2, 64).add_attended(0, *tokens, 1.0)
