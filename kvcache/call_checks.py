"""What the caller of a cache may pass: shapes, dtypes and finite numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcache.config import KVCacheConfig
from moe_bitnet.errors import ShapeError


def checked_counts(
    config: KVCacheConfig,
    layer_index: int,
    sequence_ids: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_new_tokens: Sequence[int] | None,
) -> tuple[int, ...]:
    """Check the arguments of ``PagedKVCache.extend``, all but the elements of the tensors.

    Returns:
        The new tokens of each sequence.

    Raises:
        ShapeError: see there.
    """
    if not 0 <= layer_index < config.num_layers:
        raise ShapeError(
            f"KV cache: layer_index is {layer_index}, the cache has {config.num_layers} layers. "
            f"Pass 0 to {config.num_layers - 1}, or make the cache for more layers."
        )
    num_tokens = query.shape[0]
    kv_shape = (num_tokens, config.num_kv_heads, config.head_dim)
    is_valid = query.dim() == 3 and query.shape[2] == config.head_dim and query.shape[1] % config.num_kv_heads == 0
    is_float = query.is_floating_point() and key.is_floating_point() and value.is_floating_point()
    if not is_valid or not is_float or 0 in query.shape or key.shape != kv_shape or value.shape != kv_shape:
        raise ShapeError(
            f"KV cache: query is {query.dtype} {list(query.shape)}, key {key.dtype} {list(key.shape)}, value "
            f"{value.dtype} {list(value.shape)}. Pass floats: query [num_tokens, a multiple of "
            f"{config.num_kv_heads}, {config.head_dim}], key and value [num_tokens, {config.num_kv_heads}, "
            f"{config.head_dim}], at least one token."
        )
    num_sequences = len(sequence_ids)
    if num_new_tokens is None and num_sequences and num_tokens % num_sequences == 0:
        num_new_tokens = (num_tokens // num_sequences,) * num_sequences
    counts = tuple(num_new_tokens or ())
    if len(counts) != num_sequences or sum(counts) != num_tokens or min(counts, default=0) < 1:
        raise ShapeError(
            f"KV cache: {num_tokens} tokens for {num_sequences} sequences, num_new_tokens is "
            f"{num_new_tokens}. Give at least 1 for each sequence, {num_tokens} in all."
        )
    if num_sequences > 1 and len(set(sequence_ids)) < num_sequences:
        raise ShapeError(f"KV cache: sequence_ids {list(sequence_ids)} names a sequence twice. Name each once.")
    return counts


def checked_fp16(name: str, x: Tensor, device: torch.device) -> Tensor:
    """Round to float16, contiguous, on a device.

    Raises:
        ShapeError: an element is NaN, infinite or beyond 65504.
    """
    x_fp16 = x.detach().to(device=device, dtype=torch.float16).contiguous()
    is_finite = np.isfinite(x_fp16.numpy()).all() if device.type == "cpu" else x_fp16.isfinite().all()
    if not is_finite:
        num_bad = x_fp16.numel() - int(x_fp16.isfinite().sum())
        raise ShapeError(
            f"KV cache: {num_bad} elements of {name} are not finite in float16 (largest 65504). "
            f"Look for NaN or overflow in the layer that made them."
        )
    return x_fp16
