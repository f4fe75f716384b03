"""One mixture-of-experts layer: norm, route, run the experts, add the shared one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bitnet.config import ModelConfig
from moe_bitnet.experts import ExpertExecutor, build_experts
from moe_bitnet.layers import RMSNorm
from moe_bitnet.router import Router, Routing, count_tokens_per_expert, mean_router_probabilities, router_z_loss


@dataclass(frozen=True)
class RoutingStatistics:
    """What a layer says about its routing.

    Attributes:
        router_probabilities: float32 ``[E]``, mean over tokens.
        router_z_loss: scalar float32.
        tokens_per_expert: int64 ``[E]``.
    """

    router_probabilities: Tensor
    router_z_loss: Tensor
    tokens_per_expert: Tensor


class MoELayer(nn.Module):
    """The feed-forward half of a block.

    The norm is shared by the router and all experts in both recipes: with one
    norm a layer, a token is quantized once, wherever its experts are.

    Args:
        config: sizes and recipe.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.router = Router(config.hidden_size, config.num_experts, config.top_k)
        self.experts: ExpertExecutor = build_experts(config, config.num_experts)
        self.num_shared_experts = config.num_shared_experts
        if config.num_shared_experts:
            self.shared_experts: ExpertExecutor = build_experts(config, config.num_shared_experts, is_shared=True)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, RoutingStatistics]:
        """Return the layer's output ``[T, H]`` float32 for ``hidden_states`` ``[T, H]``, and its statistics."""
        hidden_states = self.norm(hidden_states)
        routing = self.router(hidden_states)
        output = self.experts.run(hidden_states, routing)
        if self.num_shared_experts:
            output = output + self.shared_experts.run(hidden_states, self._visit_all(hidden_states))
        return output, RoutingStatistics(
            mean_router_probabilities(routing),
            router_z_loss(routing),
            count_tokens_per_expert(routing.expert_indices, routing.router_logits.shape[-1]),
        )

    def _visit_all(self, hidden_states: Tensor) -> Routing:
        num_tokens, count = hidden_states.shape[0], self.num_shared_experts
        indices = torch.arange(count, device=hidden_states.device).expand(num_tokens, count)
        ones = hidden_states.new_ones((num_tokens, count), dtype=torch.float32)
        return Routing(indices, ones, ones)
