"""The whole model: embed, walk the blocks, normalize, score the vocabulary.

Token ids enter, logits leave. The residual stream is float32; embedding, head,
norms and router are never ternary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_bitnet.attention import Attention, AttentionCache
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ShapeError
from moe_bitnet.experts import ExpertExecutor
from moe_bitnet.layers import RMSNorm
from moe_bitnet.moe import MoELayer, RoutingStatistics


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    Attributes:
        logits: float32 ``[B, S, V]``.
        router_probabilities: float32 ``[num_layers, E]``, means over tokens, for
            :func:`moe_bitnet.router.load_balance_loss`.
        router_z_loss: scalar, mean over layers.
        tokens_per_expert: int64 ``[num_layers, E]``.
    """

    logits: Tensor
    router_probabilities: Tensor
    router_z_loss: Tensor
    tokens_per_expert: Tensor


class Block(nn.Module):
    """Attention and a mixture of experts, each added to the residual stream.

    Args:
        config: sizes and recipe.
        layer_index: position of the block.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_index)
        self.moe = MoELayer(config)

    def forward(self, hidden_states: Tensor, cache: AttentionCache | None = None) -> tuple[Tensor, RoutingStatistics]:
        """Return the next ``hidden_states`` ``[B, S, H]`` and the statistics of the router."""
        hidden_states = hidden_states + self.attention(hidden_states, cache)
        output, statistics = self.moe(hidden_states.flatten(0, 1))
        return hidden_states + output.view_as(hidden_states), statistics


class MoETransformer(nn.Module):
    """A decoder-only transformer whose feed-forward layers are mixtures of experts.

    Args:
        config: sizes, precision and recipe; the weights are drawn from torch's global generator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.has_activation_checkpointing = False  # in training: compute blocks again rather than keep what they hold
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.has_tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, token_ids: Tensor, cache: AttentionCache | None = None) -> ModelOutput:
        """Score the next token at every position.

        Args:
            token_ids: int64 ``[B, S]``; with a cache B is 1 and these are the tokens after those it holds.
            cache: keys and values of the tokens before, extended in place.
        Raises:
            ShapeError: not ``[B, S]``, empty, an id beyond the vocabulary, or several sequences with a cache.
        """
        self._check(token_ids, cache)
        hidden_states = self.embedding(token_ids).float()
        statistics: list[RoutingStatistics] = []
        for block in self.blocks:
            if self.has_activation_checkpointing and torch.is_grad_enabled():
                hidden_states, of_block = checkpoint(block, hidden_states, cache, use_reentrant=False)
            else:
                hidden_states, of_block = block(hidden_states, cache)
            statistics.append(of_block)
        head = self.embedding.weight if self.config.has_tied_embeddings else self.lm_head.weight
        logits = F.linear(self.norm(hidden_states), head.float()).float()
        return ModelOutput(
            logits,
            torch.stack([s.router_probabilities for s in statistics]),
            torch.stack([s.router_z_loss for s in statistics]).mean(),
            torch.stack([s.tokens_per_expert for s in statistics]),
        )

    def replace_experts(self, executors: Sequence[ExpertExecutor]) -> None:
        """Let other executors run the routed experts, one a layer; the local experts are released.

        Raises:
            ShapeError: not one executor a layer.
        """
        if len(executors) != len(self.blocks):
            raise ShapeError(
                f"replace_experts: {len(executors)} executors for {len(self.blocks)} layers. Give one a layer."
            )
        for block, executor in zip(self.blocks, executors, strict=True):
            assert isinstance(block, Block)
            del block.moe.experts
            block.moe.experts = executor

    def _check(self, token_ids: Tensor, cache: AttentionCache | None) -> None:
        if token_ids.dim() != 2 or token_ids.numel() == 0 or token_ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(
                f"token_ids is {token_ids.dtype} {list(token_ids.shape)}; "
                f"give [batch_size, seq_len] of int64, not empty."
            )
        if cache is not None and token_ids.shape[0] != 1:
            raise ShapeError(
                f"token_ids holds {token_ids.shape[0]} sequences; a cache holds one. Pass them one by one."
            )
        if not torch.compiler.is_compiling():
            largest, smallest = int(token_ids.max()), int(token_ids.min())
            if largest >= self.config.vocab_size or smallest < 0:
                raise ShapeError(
                    f"token_ids range from {smallest} to {largest}; the vocabulary has {self.config.vocab_size}. "
                    f"Use the tokenizer that the model was trained with."
                )
