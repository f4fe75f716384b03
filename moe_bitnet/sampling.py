"""Choosing the next token from its logits."""

import math

import torch
from torch import Tensor

from moe_bitnet.errors import ConfigError


def sample(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """Choose a token.

    Args:
        logits: float ``[V]``.
        temperature: 0 takes the best token; higher values flatten the distribution.
        top_p: sample among the fewest tokens whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751).
        generator: source of randomness, for repeatable samples.
    Returns:
        the id of the token.
    Raises:
        ConfigError: temperature is negative, or top_p is not in (0, 1].
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ConfigError(f"sample: temperature {temperature} must be at least 0 and finite, top_p {top_p} in (0, 1].")
    if temperature == 0:
        return int(logits.argmax())
    # the largest becomes 0, so that no temperature overflows; in float64, where tiny ones stay above 0
    scaled = (logits.double() - logits.max()) / temperature
    probabilities, token_ids = scaled.softmax(dim=-1).sort(descending=True)
    # keep a token while the sum before it is below top_p: the best one always stays
    kept = probabilities * (probabilities.cumsum(0) - probabilities < top_p)
    return int(token_ids[torch.multinomial(kept, 1, generator=generator)])
