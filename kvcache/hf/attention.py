"""What transformers calls in place of its own attention: one function for attention and one for masks.

A model's attention layer first hands its new keys to ``cache.update``, which returns what to attend to, and then calls
the attention function by the name in its config. Ours must learn there which cache the keys belong to. So ``update``
*marks* the key tensor that it returns (``mark``), and the function asks the marked tensor. Keys without a mark come
from another cache or from none: they take the usual way (sdpa).

The mask function runs once a forward pass, before any layer, and is told only lengths. A cache of ours gives its length
as a ``PagedLength``; then the two-dimensional padding mask is handed through as it is, so that no memory grows with
queries times keys. For any other length it returns the mask that sdpa needs.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from moe_bitnet.errors import ConfigError

PAGED_ATTENTION = "moe_bitnet_paged"

_MARK = "_moe_bitnet_attention"
# Keyword arguments that change the formula of attention, and their values that leave it unchanged.
_NEUTRAL = {
    "dropout": (None, 0, 0.0),
    "sliding_window": (None,),
    "softcap": (None,),
    "s_aux": (None,),
    "position_bias": (None,),
    "is_causal": (None, True),
}


class AttendsFreshKeys(Protocol):
    """What a marked key tensor carries: how to attend to it and to all that came before."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Return ``[batch_size, seq_len, num_heads, head_dim]``; arguments as of ``paged_attention_forward``."""


class PagedLength(int):
    """A number of keys in a cache that needs no four-dimensional mask."""


class UnsupportedMask:
    """Stands for a mask other than causal."""


def register() -> None:
    """Make ``PAGED_ATTENTION`` known to transformers; again and again is fine."""
    AttentionInterface.register(PAGED_ATTENTION, paged_attention_forward)
    AttentionMaskInterface.register(PAGED_ATTENTION, paged_mask)


def mark(key: Tensor, attention: AttendsFreshKeys) -> Tensor:
    """Return ``key``, which now says who attends to it."""
    setattr(key, _MARK, attention)
    return key


def paged_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as the owner of the keys says, or with sdpa where they have none.

    Args:
        module: the attention layer.
        query: ``[batch_size, num_heads, seq_len, head_dim]``.
        key: ``[batch_size, num_kv_heads, seq_len, head_dim]``, what ``cache.update`` returned.
        value: like ``key``.
        attention_mask: what ``paged_mask`` returned.
        kwargs: ``scaling``, ``dropout`` and more.

    Returns:
        ``[batch_size, seq_len, num_heads, head_dim]``, and no attention weights.
    """
    owner: AttendsFreshKeys | None = getattr(key, _MARK, None)
    if owner is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs), None
    return owner.attend(module, query, key, value, attention_mask, **kwargs), None


def paged_mask(
    *, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> "Tensor | UnsupportedMask | None":
    """Return the padding mask (bool ``[batch_size, num_positions]``) for a paged cache, else what sdpa needs.

    Some models ask for masks that none of their layers uses (Qwen2-MoE: one of a sliding window), so a pattern that a
    paged cache does not know is no error before a layer comes with it.
    """
    if not isinstance(kv_length, PagedLength):
        mask: Tensor | None = sdpa_mask(kv_length=kv_length, attention_mask=attention_mask, **kwargs)
        return mask
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        return UnsupportedMask()
    return attention_mask


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Attend with transformers' sdpa function; shapes as of ``paged_attention_forward``."""
    output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return output


def check_plain_attention(module: nn.Module, attention_mask: object, kwargs: dict[str, Any]) -> None:
    """Refuse what the paged cache would compute otherwise than the model means it.

    Raises:
        ConfigError: the mask or a keyword argument of an attention call changes the formula, or the layer is being
            trained.
    """
    if isinstance(attention_mask, UnsupportedMask) or (isinstance(attention_mask, Tensor) and attention_mask.ndim != 2):
        raise ConfigError(
            f"HFPagedCache: {type(module).__name__} comes with a mask other than causal. Give a padding mask "
            f"[batch_size, num_positions] or none, or use transformers' DynamicCache."
        )
    for name, neutral in _NEUTRAL.items():
        given = kwargs.get(name)
        if not any(given is allowed or (allowed is not None and given == allowed) for allowed in neutral):
            raise ConfigError(
                f"HFPagedCache: {type(module).__name__} attends with {name}={given!r}, which a paged cache does not "
                f"compute. Call model.eval(), or use transformers' DynamicCache with this model."
            )
    if module.training and torch.is_grad_enabled():
        raise ConfigError("HFPagedCache: attention has no gradients here. Call model.eval(), or train without a cache.")
