"""How well a model predicts text: the loss of every token, through a cache or without."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bitnet.attention import AttentionCache
from moe_bitnet.errors import ShapeError
from moe_bitnet.model import MoETransformer


@torch.inference_mode()
def token_losses(
    model: MoETransformer,
    token_ids: Tensor,
    cache: AttentionCache | None = None,
    chunk_len: int = 64,
    on_chunk: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the cross entropy of each token after the first, given all before it.

    With a cache the text passes in chunks, as in decoding: a token sees the
    earlier chunks as the cache kept them.

    Args:
        model: in evaluation mode.
        token_ids: int64 ``[S + 1]``.
        cache: an empty cache, left holding S tokens; ``None`` scores all at once.
        chunk_len: tokens that enter the cache together.
        on_chunk: called with the number of tokens scored so far.
    Returns:
        float32 ``[S]``, in nats.
    Raises:
        ShapeError: fewer than two tokens.
    """
    if token_ids.dim() != 1 or len(token_ids) < 2:
        raise ShapeError(
            f"token_losses: token_ids has shape {list(token_ids.shape)}; give [S + 1] with S of at least 1."
        )
    inputs, targets = token_ids[:-1], token_ids[1:]
    if cache is None:
        chunk_len = len(inputs)
    losses = []
    for start in range(0, len(inputs), chunk_len):
        chunk = slice(start, start + chunk_len)
        logits = model(inputs[None, chunk], cache).logits[0]
        losses.append(F.cross_entropy(logits, targets[chunk], reduction="none"))
        if on_chunk is not None:
            on_chunk(min(start + chunk_len, len(inputs)))
    return torch.cat(losses)


def perplexity(losses: Tensor) -> float:
    """Return ``exp(mean loss)``; infinite if that overflows."""
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf
