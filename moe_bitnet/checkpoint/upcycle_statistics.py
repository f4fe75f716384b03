"""What a dense model's layers see on real text: from token ids to the numbers that upcycling starts from.

A ternary model normalizes the input of each output projection (sub-norms), a dense one does not. The norm divides a
row ``x`` by its root mean square ``r``; the gain ``g`` that brings back most of what was there, over tokens t, is the
least-squares one of each feature j::

    g_j = Σ_t x_tj · (x_tj / r_t)  /  Σ_t (x_tj / r_t)²

The first token of a sequence is left out: models park attention there, and give it rows of another size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bitnet.errors import ShapeError
from moe_bitnet.experts import FloatExperts, gated_activation
from moe_bitnet.model import Block, MoETransformer


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer of a dense model.

    Attributes:
        attention_gain: float32 ``[N · D]``, of a norm before the attention's output projection.
        inner_gain: float32 ``[F]``, of a norm before the feed-forward network's down projection.
        hidden_mean: float32 ``[H]``, mean of the normalized rows that enter the feed-forward network.
    """

    attention_gain: Tensor
    inner_gain: Tensor
    hidden_mean: Tensor


class _GainSums:
    """Sums over tokens from which the gain of a norm follows."""

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.products: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Take ``rows`` ``[n, features]``."""
        rows = rows.double()
        normalized = rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        self.products += (rows * normalized).sum(0)
        self.squares += normalized.square().sum(0)

    def gain(self) -> Tensor:
        """Return float32 ``[features]``; 1 for a feature that was always 0."""
        products, squares = torch.as_tensor(self.products), torch.as_tensor(self.squares)
        return torch.where(squares > 0, products / squares, 1.0).float()


class _LayerSums:
    """Listens to one block."""

    def __init__(self, block: Block) -> None:
        eps = block.moe.norm.eps
        self.attention, self.inner = _GainSums(eps), _GainSums(eps)
        self.hidden_sum: Tensor | float = 0.0
        self.num_rows = 0
        experts = block.moe.shared_experts
        assert isinstance(experts, FloatExperts)
        self.experts = experts
        self.handles = (
            block.attention.o_proj.register_forward_pre_hook(self.hear_attention),
            block.moe.norm.register_forward_hook(self.hear_hidden),
        )

    def hear_attention(self, module: Any, inputs: tuple[Tensor]) -> None:
        self.attention.add(inputs[0][:, 1:].flatten(0, 1))

    def hear_hidden(self, module: Any, inputs: tuple[Tensor], rows: Tensor) -> None:
        rows = rows[1:]  # of one sequence
        self.hidden_sum += rows.double().sum(0)
        self.num_rows += rows.shape[0]
        gate, up = (F.linear(rows, self.experts.get_parameter(f"{name}_weight")[0]) for name in ("gate", "up"))
        self.inner.add(gated_activation(gate, up, self.experts.activation))

    def statistics(self) -> LayerStatistics:
        mean = torch.as_tensor(self.hidden_sum) / self.num_rows
        return LayerStatistics(self.attention.gain(), self.inner.gain(), mean.float())


@torch.no_grad()
def collect_statistics(
    dense: MoETransformer, token_ids: Tensor, on_sequence: Callable[[int], None] | None = None
) -> list[LayerStatistics]:
    """Run a dense model over text and look into its layers.

    Args:
        dense: from :func:`moe_bitnet.checkpoint.upcycle_source.dense_model`.
        token_ids: int64 ``[B, S]``, B sequences of at least two tokens of text; a few thousand are enough.
        on_sequence: called with the number of sequences read so far.
    Returns:
        one a layer.
    Raises:
        ShapeError: ``token_ids`` has another shape.
    """
    if token_ids.dim() != 2 or token_ids.shape[0] == 0 or token_ids.shape[1] < 2:
        raise ShapeError(f"collect_statistics: token_ids is {list(token_ids.shape)}; give [B, S] with S of 2 or more.")
    blocks = [block for block in dense.blocks if isinstance(block, Block)]
    layers = [_LayerSums(block) for block in blocks]
    try:
        for index, sequence in enumerate(token_ids):
            dense(sequence[None])
            if on_sequence is not None:
                on_sequence(index + 1)
    finally:
        for layer in layers:
            for handle in layer.handles:
                handle.remove()
    return [layer.statistics() for layer in layers]
