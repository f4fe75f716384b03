"""Moments of random tokens, for the tests of calibration."""

import torch

from kvcache.moments import Moments

NUM_TOKENS = 1024


def skewed_tokens(seed=0):
    """Queries, keys and values whose channels differ by orders of magnitude, with a large mean key."""
    generator = torch.Generator().manual_seed(seed)
    key_power, query_power = torch.logspace(1, -2, 64), torch.logspace(0.5, -1, 64)
    mean = 3 * torch.randn(64, generator=torch.Generator().manual_seed(9))
    mixing = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(8)))[0]
    query = torch.randn(NUM_TOKENS, 6, 64, generator=generator) * query_power @ mixing
    key = torch.randn(NUM_TOKENS, 2, 64, generator=generator) * key_power @ mixing + mean
    value = torch.randn(NUM_TOKENS, 2, 64, generator=generator) + 1
    return query, key, value


def moments_of(*tokens):
    moments = Moments.zeros(2, 2, 64)
    for layer_index in range(2):
        moments.add(layer_index, *tokens)
    return moments
