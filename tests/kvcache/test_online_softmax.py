import itertools

import pytest
import torch

from kvcache import online_softmax
from kvcache.online_softmax import OnlineSoftmax, merge


def random_case(num_keys, num_tokens, num_kv_heads=2, rows_per_token=3, head_dim=8, scale=1.0):
    generator = torch.Generator().manual_seed(num_keys)
    query = torch.randn(num_kv_heads, num_tokens * rows_per_token, head_dim, generator=generator) * scale
    key, value = torch.randn(2, num_kv_heads, num_keys, head_dim, generator=generator)
    return query, key, value


def dense_attention(query, key, value, rows_per_token):
    """The formula, with the whole score matrix, in the dtype of its inputs."""
    num_keys = key.shape[1]
    num_tokens = query.shape[1] // rows_per_token
    positions = num_keys - num_tokens + torch.arange(query.shape[1]) // rows_per_token
    scores = query @ key.transpose(1, 2)
    return scores.masked_fill(positions[:, None] < torch.arange(num_keys), -torch.inf).softmax(dim=-1) @ value


def assert_as_exact_as_dense_float32(output, query, key, value, rows_per_token):
    truth = dense_attention(query.double(), key.double(), value.double(), rows_per_token)
    plain_error = (dense_attention(query, key, value, rows_per_token) - truth).abs().max()
    two_ulps = 2 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (output - truth).abs().max() <= plain_error + two_ulps


def tiled_attention(query, key, value, tiles, rows_per_token):
    """Attend to the tiles in turn, even ones in one sum and odd ones in another, and merge both."""
    first_position = key.shape[1] - query.shape[1] // rows_per_token
    parts = [OnlineSoftmax(query, first_position, rows_per_token) for _ in range(2)]
    for index, (start, stop) in enumerate(tiles):
        parts[index % 2].add_tile(key[:, start:stop], value[:, start:stop], start)
    return merge(*parts)


@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@pytest.mark.parametrize("cuts", [[0, 33], [0, 1, 33], [0, 10, 20, 30, 33], [0, 32, 33]])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_tiles_match_dense_attention(num_tokens, cuts, scale):
    query, key, value = random_case(33, num_tokens, scale=scale)
    tiles = list(itertools.pairwise(cuts))
    for order in (tiles, tiles[::-1]):
        output = tiled_attention(query, key, value, order, rows_per_token=3)
        assert_as_exact_as_dense_float32(output, query, key, value, rows_per_token=3)


def test_rows_are_tiled_too(monkeypatch):
    monkeypatch.setattr(online_softmax, "MAX_ROWS_PER_TILE", 5)
    query, key, value = random_case(33, 33)
    output = tiled_attention(query, key, value, [(0, 16), (16, 33)], rows_per_token=3)
    assert_as_exact_as_dense_float32(output, query, key, value, rows_per_token=3)


def test_scores_beyond_float32_exp_stay_finite():
    query, key, value = random_case(7, 7, scale=1e6)
    output = tiled_attention(query, key, value, [(4, 7), (0, 4)], rows_per_token=3)
    assert output.isfinite().all()
