"""Second moments of a model's queries, keys and values: what calibration keeps of a text.

In: post-RoPE queries, keys and values, layer by layer. Out: means over tokens, for ``calibration.py``.

Everything is summed twice: with all tokens alike, and with every token weighted by the squared attention that it gets
once it is old (``old_attention.py``). Few tokens get most of it, and they are not like the others.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcache.old_attention import old_attention
from moe_bitnet.errors import CheckpointError, ShapeError

# Of the weight of second moments and means: how much follows attention. The rest is for what other texts attend to.
ATTENDED_SHARE = 0.5
_SUMS = ("key_sum", "key_square", "query_square", "value_sum", "value_square")
_NAMES = ("count", *_SUMS, "attended_weight", *(f"attended_{name}" for name in _SUMS))


@dataclass
class Moments:
    """Sums over tokens, for every layer and KV head; float64.

    Attributes:
        count: ``[L]`` tokens.
        key_sum: ``[L, G, D]``.
        key_square: ``[L, G, D, D]``, sums of outer products.
        query_square: like ``key_square``, over tokens and the query heads of a KV head.
        value_sum: ``[L, G, D]``.
        value_square: ``[L, G, D, D]``.
        attended_weight: ``[L, G]``, squared attention weights on old tokens (``old_attention.py``).
        attended_key_sum: like ``key_sum``, each token times the squared attention weights that it received.
        attended_key_square: likewise.
        attended_query_square: likewise, each query times the squared weights that it gave.
        attended_value_sum: likewise.
        attended_value_square: likewise.
    """

    count: Tensor
    key_sum: Tensor
    key_square: Tensor
    query_square: Tensor
    value_sum: Tensor
    value_square: Tensor
    attended_weight: Tensor
    attended_key_sum: Tensor
    attended_key_square: Tensor
    attended_query_square: Tensor
    attended_value_sum: Tensor
    attended_value_square: Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_kv_heads: int, head_dim: int) -> "Moments":
        """Return moments of no token."""
        heads = (num_layers, num_kv_heads)
        vector, matrix = (*heads, head_dim), (*heads, head_dim, head_dim)
        sums = (vector, matrix, matrix, vector, matrix)
        shapes = ((num_layers,), *sums, heads, *sums)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count tokens of one layer.

        Args:
            layer_index: which layer.
            query: ``[T, num_heads, head_dim]``, floats, after RoPE.
            key: ``[T, num_kv_heads, head_dim]``, after RoPE.
            value: like ``key``.

        Raises:
            ShapeError: sizes differ from those of these moments.
        """
        query, key, value = self._by_head("Moments.add", query, key, value)
        self.count[layer_index] += key.shape[1]
        for name, x in (("key", key), ("value", value)):
            getattr(self, f"{name}_sum")[layer_index] += x.sum(dim=1)
            getattr(self, f"{name}_square")[layer_index] += x.mT @ x
        self.query_square[layer_index] += query.mT @ query

    def add_attended(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Count old tokens of one layer once more, by the attention that new queries pay them.

        Args:
            layer_index: which layer.
            query: ``[num_new, num_heads, head_dim]``, of the last tokens.
            key: ``[T, num_kv_heads, head_dim]``, of all tokens so far.
            value: like ``key``.
            scaling: factor of scores.

        Raises:
            ShapeError: sizes differ from those of these moments.
        """
        num_new, on_device = len(query), (query.transpose(0, 1), key.transpose(0, 1))
        query, key, value = self._by_head("Moments.add_attended", query, key, value)
        attention = old_attention(*on_device, scaling)
        received = attention.received.cpu().double().unsqueeze(2)  # [G, T, 1]
        given = attention.given.cpu().double().view(len(key), -1, num_new).transpose(1, 2).flatten(1).unsqueeze(2)
        self.attended_weight[layer_index] += received.sum(dim=(1, 2))
        for name, x in (("key", key), ("value", value)):
            getattr(self, f"attended_{name}_sum")[layer_index] += (received * x).sum(dim=1)
            getattr(self, f"attended_{name}_square")[layer_index] += (received * x).mT @ x
        self.attended_query_square[layer_index] += (given * query).mT @ query

    def _by_head(self, caller: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return float64 ``[G, T * N / G, D]``, the heads of a token together, and twice ``[G, T, D]``."""
        _, num_kv_heads, head_dim = self.key_sum.shape
        if key.shape != value.shape or key.shape[1:] != (num_kv_heads, head_dim) or query.shape[1] % num_kv_heads:
            raise ShapeError(
                f"{caller}: query, key, value have shapes {list(query.shape)}, {list(key.shape)}, "
                f"{list(value.shape)}; give [T, a multiple of {num_kv_heads}, {head_dim}] and twice "
                f"[T, {num_kv_heads}, {head_dim}]."
            )
        key, value = (x.cpu().double().transpose(0, 1) for x in (key, value))
        grouped = query.cpu().double().reshape(query.shape[0], num_kv_heads, -1, head_dim)
        return grouped.transpose(0, 1).flatten(1, 2), key, value

    def mean(self, name: str, layer_index: int) -> Tensor:
        """Return a mean over tokens, half of its weight by attention; ``[G, D]``, or ``[G, D, D]`` of squares.

        Args:
            name: "key_sum", "key_square", "value_sum" or "value_square"; "query_square" up to a factor.
            layer_index: which layer.
        """
        plain = getattr(self, name)[layer_index] / self.count[layer_index]
        attended = getattr(self, f"attended_{name}")[layer_index]
        weight = self.attended_weight[layer_index].view(-1, *[1] * (plain.ndim - 1))
        if name == "query_square":  # of unknown numbers of heads: bring both to the same size
            plain, attended = (x / _mean_diagonal(x).clamp(min=1e-30) for x in (plain, attended))
        else:
            attended = attended / weight.clamp(min=1e-30)
        return torch.where(weight > 0, plain + ATTENDED_SHARE * (attended - plain), plain)

    def save(self, path: Path) -> None:
        """Write the moments to a safetensors file, as float32."""
        save_file({name: getattr(self, name).float().contiguous() for name in _NAMES}, path)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Read a file that ``save`` wrote.

        Raises:
            CheckpointError: it is missing, or is no such file.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"calibration {path} cannot be read ({error}). Calibrate the model again.") from error
        if sorted(tensors) != sorted(_NAMES):
            raise CheckpointError(
                f"{path} holds {sorted(tensors)}, not the moments {list(_NAMES)}. Calibrate the model again."
            )
        return cls(*(tensors[name].double() for name in _NAMES))


def _mean_diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
