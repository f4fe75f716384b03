import pytest
import torch

from kvcache.old_attention import old_attention

NUM_TOKENS = 5 * 64 + 7


def tokens(seed=0):
    """Queries ``[4, T, 16]`` and keys ``[2, T, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_heads, NUM_TOKENS, 16, generator=generator) for num_heads in (4, 2))


def naive(query, key, scaling):
    """Squared weights ``[4, T, T]`` of every query on every token that it meets packed, one pair at a time."""
    scores = scaling * query.double() @ key.double().repeat_interleave(2, dim=0).mT
    squares = scores.masked_fill(torch.ones(NUM_TOKENS, NUM_TOKENS).triu(1).bool(), -torch.inf).softmax(dim=-1) ** 2
    for row in range(NUM_TOKENS):
        for column in range(NUM_TOKENS):
            if column < 64 or column // 64 + 2 >= row // 64:
                squares[:, row, column] = 0
    return squares


@pytest.mark.parametrize("num_new", [1, 7, 129, NUM_TOKENS])
def test_sums_are_those_of_all_pairs(num_new):
    query, key = tokens()
    expected = naive(query, key, 0.3)[:, -num_new:]
    attention = old_attention(query[:, -num_new:], key, 0.3)
    torch.testing.assert_close(attention.given.double(), expected.sum(dim=2), rtol=1e-4, atol=1e-9)
    by_head = expected.sum(dim=1).view(2, 2, NUM_TOKENS).sum(dim=1)
    torch.testing.assert_close(attention.received.double(), by_head, rtol=1e-4, atol=1e-9)
    assert attention.received[:, :64].sum() == 0 < attention.received.sum()


def test_no_token_is_old_in_a_short_text():
    query, key = (x[:, :256] for x in tokens())
    attention = old_attention(query, key, 1.0)
    assert attention.given.sum() == attention.received.sum() == 0
