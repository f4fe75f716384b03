"""Writing text, one token after the other.

Without a cache every step computes the whole prefix again: slow and plain, it is
what a cache is tested against.
"""

from collections.abc import Callable, Sequence

import torch

from moe_bitnet.attention import AttentionCache
from moe_bitnet.errors import ConfigError
from moe_bitnet.model import MoETransformer
from moe_bitnet.sampling import sample


@torch.inference_mode()
def generate(
    model: MoETransformer,
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
        model: in evaluation mode.
        prompt_ids: at least one token.
        max_new_tokens: tokens to add at most.
        cache: an empty key/value cache, or ``None`` to recompute the prefix at each step.
        temperature: 0 is greedy; see :func:`moe_bitnet.sampling.sample`.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        stop_id: a token that ends the text; it is not returned.
        on_token: called with each new token as soon as it is known.
    Returns:
        the new tokens, without the prompt.
    Raises:
        ConfigError: the prompt is empty or the cache is not.
    """
    if not prompt_ids:
        raise ConfigError("generate: the prompt is empty. Give at least one token.")
    if cache is not None and cache.length:
        raise ConfigError(f"generate: the cache holds {cache.length} tokens already. Give an empty one.")
    generator = torch.Generator().manual_seed(seed)
    token_ids = list(prompt_ids)
    device = model.embedding.weight.device
    while len(token_ids) < len(prompt_ids) + max_new_tokens:
        fresh = token_ids[cache.length :] if cache is not None else token_ids
        logits = model(torch.tensor([fresh], device=device), cache).logits[0, -1].cpu()
        next_id = sample(logits, temperature, top_p, generator)
        if next_id == stop_id:
            break
        token_ids.append(next_id)
        if on_token is not None:
            on_token(next_id)
    return token_ids[len(prompt_ids) :]
