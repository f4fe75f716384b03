"""What every backend asks of the new tokens of a call."""

from torch import Tensor

from kvcache.page import LayerFormat
from moe_bitnet.errors import ShapeError


def check_tokens(layer_format: LayerFormat, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check the shapes of queries, keys and values against each other and the layer.

    Raises:
        ShapeError: they do not fit.
    """
    num_kv_heads, head_dim = layer_format.num_kv_heads, layer_format.head_dim
    kv_shape = (query.shape[0], num_kv_heads, head_dim)
    is_query = query.dim() == 3 and query.shape[2] == head_dim and query.shape[1] % num_kv_heads == 0
    if not is_query or key.shape != kv_shape or value.shape != kv_shape:
        raise ShapeError(
            f"paged_attention: query, key and value have shapes {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}. The layer has {num_kv_heads} KV heads of {head_dim} channels: give "
            f"[num_tokens, a multiple of {num_kv_heads}, {head_dim}], and twice "
            f"[num_tokens, {num_kv_heads}, {head_dim}]."
        )
