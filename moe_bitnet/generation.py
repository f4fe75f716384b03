"""Writing text, one token after the other.

Three ways give the same text: a :class:`moe_bitnet.decoder.PackedDecoder` (a step is one call of the C++ library,
the fast way for a packed model on the CPU), a model with a cache, and a model without one, which computes the whole
prefix again at every step: slow and plain, it is what the others are tested against.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_bitnet.attention import AttentionCache
from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.errors import ConfigError
from moe_bitnet.model import MoETransformer
from moe_bitnet.sampling import sample


@torch.inference_mode()
def generate(
    model: MoETransformer | PackedDecoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    cache: AttentionCache | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue a prompt.

    Args:
        model: in evaluation mode; or a decoder that holds no tokens yet.
        prompt_ids: at least one token.
        max_new_tokens: tokens to add at most.
        cache: an empty key/value cache, or ``None`` to recompute the prefix at each step. A decoder has its own.
        temperature: 0 is greedy; see :func:`moe_bitnet.sampling.sample`.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        stop_id: a token that ends the text; it is not returned.
        on_token: called with each new token as soon as it is known.
    Returns:
        the new tokens, without the prompt.
    Raises:
        ConfigError: the prompt is empty, the cache is not, or a decoder is given one.
    """
    if not prompt_ids:
        raise ConfigError("generate: the prompt is empty. Give at least one token.")
    score = _scorer(model, cache)
    generator = torch.Generator().manual_seed(seed)
    token_ids = list(prompt_ids)
    num_scored = 0
    while len(token_ids) < len(prompt_ids) + max_new_tokens:
        logits = score(token_ids, num_scored)
        num_scored = len(token_ids)
        next_id = sample(logits, temperature, top_p, generator)
        if next_id == stop_id:
            break
        token_ids.append(next_id)
        if on_token is not None:
            on_token(next_id)
    return token_ids[len(prompt_ids) :]


def _scorer(
    model: MoETransformer | PackedDecoder, cache: AttentionCache | None
) -> Callable[[Sequence[int], int], Tensor]:
    """Return a function of (all tokens, how many of them were scored before) that gives the next token's logits."""
    if isinstance(model, PackedDecoder):
        if cache is not None:
            raise ConfigError("generate: a PackedDecoder holds its own keys and values. Give no cache.")
        _require_empty(model.length)
        return lambda token_ids, num_scored: model.append(token_ids[num_scored:])
    device = model.embedding.weight.device
    if cache is not None:
        _require_empty(cache.length)

    def score(token_ids: Sequence[int], num_scored: int) -> Tensor:
        fresh = token_ids[num_scored:] if cache is not None else token_ids
        logits: Tensor = model(torch.tensor([fresh], device=device), cache).logits[0, -1].cpu()
        return logits

    return score


def _require_empty(length: int) -> None:
    if length:
        raise ConfigError(f"generate: the cache holds {length} tokens already. Give an empty one.")
