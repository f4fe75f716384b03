"""The router: which experts a token visits, and with what weight.

``hidden_states [T, H] ──► Routing(expert_indices [T, K], expert_weights [T, K], router_logits [T, E])``

It is a small float32 matrix, never ternary and never in bfloat16: a rounding
here sends a token elsewhere. No token is dropped and no expert has a capacity.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        expert_indices: int64 ``[T, K]``, best expert first; all different within a row.
        expert_weights: float32 ``[T, K]``; a row sums to 1.
        router_logits: float32 ``[T, E]``.
    """

    expert_indices: Tensor
    expert_weights: Tensor
    router_logits: Tensor


class Router(nn.Module):
    """Score every expert for every token and keep the ``top_k`` best.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden_states: Tensor) -> Routing:
        """Route ``hidden_states`` ``[T, H]``."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(hidden_states.float(), self.weight.float())
        top_logits, expert_indices = router_logits.topk(self.top_k, dim=-1)
        # the softmax over all experts, renormalized over the chosen ones
        return Routing(expert_indices, top_logits.softmax(dim=-1), router_logits)


def count_tokens_per_expert(expert_indices: Tensor, num_experts: int) -> Tensor:
    """Count the visits to each expert; int64 ``[E]`` from ``expert_indices`` ``[T, K]``."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_indices.device)
    flat = expert_indices.flatten()
    return counts.index_add(0, flat, torch.ones_like(flat))


def mean_router_probabilities(routing: Routing) -> Tensor:
    """Return the mean over tokens of each expert's probability; float32 ``[E]``, sums to 1."""
    return routing.router_logits.softmax(dim=-1).mean(dim=0)


def load_balance_loss(router_probabilities: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Return the loss that is 1 for a uniform router and E / K for one that always takes the same K experts.

    ``E · Σ_e f_e · P_e`` with f_e the share of visits to expert e (no gradient) and P_e its mean probability. The
    loss is linear in P: with the visits of the whole batch, and each worker's P of its own part, the mean of the
    workers' losses is the loss of the whole batch.

    Args:
        router_probabilities: ``[..., E]`` from :func:`mean_router_probabilities`; leading sizes are layers.
        tokens_per_expert: ``[..., E]``, visits in the whole batch.
    Returns:
        a scalar, the mean over layers.
    Source: Fedus et al. 2021, arXiv:2101.03961, equation 4, with visits of all K choices; balance over the whole
        batch: Qiu et al. 2025, arXiv:2501.11873.
    """
    visits = tokens_per_expert.to(router_probabilities.dtype)
    share = visits / visits.sum(dim=-1, keepdim=True)
    return router_probabilities.shape[-1] * (share * router_probabilities).sum(dim=-1).mean()


def router_z_loss(routing: Routing) -> Tensor:
    """Return the mean squared log-sum-exp of the router's logits, which keeps them small.

    Source: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    return routing.router_logits.logsumexp(dim=-1).square().mean()
