"""Tokens to experts and back: sort by expert, then undo the sort and add up.

::

    expert_indices [T, K] ──sort_by_expert──► rows sorted by expert: sorted_token_indices [n], expert_offsets [E + 1]
    outputs [n, H] (sorted) ──combine──► [T, H] in the original order

One sort serves the whole layer; nothing loops over tokens, and nothing is dropped.
A *slot* is one (token, choice) pair, numbered ``token · K + choice``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bitnet.router import count_tokens_per_expert


@dataclass(frozen=True)
class Dispatch:
    """The order in which experts see their rows.

    Attributes:
        sorted_token_indices: int64 ``[n]``; row in the sorted order → token. Without alignment n = T·K.
        slot_positions: int64 ``[T·K]``; slot → its row in the sorted order.
        expert_offsets: int64 ``[E + 1]``; expert e owns rows ``offsets[e]:offsets[e + 1]``.
    """

    sorted_token_indices: Tensor
    slot_positions: Tensor
    expert_offsets: Tensor


def sort_by_expert(expert_indices: Tensor, num_experts: int, row_alignment: int = 1) -> Dispatch:
    """Sort all slots by expert, stable in the token.

    Args:
        expert_indices: int64 ``[T, K]`` with values in ``[0, num_experts)``.
        num_experts: E.
        row_alignment: every expert's rows start at a multiple of this. The gaps hold copies of
            token 0 that :func:`combine` never reads, and n is ``T·K`` rounded up plus ``E · row_alignment``
            at most, so that shapes do not depend on the routing.
    """
    slot_experts = expert_indices.flatten()
    num_slots = slot_experts.numel()
    counts = count_tokens_per_expert(expert_indices, num_experts)
    aligned_counts = (counts + row_alignment - 1) // row_alignment * row_alignment
    expert_offsets = torch.cat((counts.new_zeros(1), aligned_counts.cumsum(0)))
    sorted_slots = slot_experts.argsort(stable=True)
    rank_of_slot = torch.empty_like(sorted_slots)
    rank_of_slot[sorted_slots] = torch.arange(num_slots, device=sorted_slots.device)
    # what alignment inserted before each expert
    gaps = expert_offsets[:-1] - (counts.cumsum(0) - counts)
    slot_positions = rank_of_slot + gaps[slot_experts]
    num_rows = num_slots
    if row_alignment > 1:
        num_rows = (num_slots + num_experts * (row_alignment - 1)) // row_alignment * row_alignment
        # the last expert takes what is left over
        expert_offsets = torch.cat((expert_offsets[:-1], counts.new_full((1,), num_rows)))
    top_k = expert_indices.shape[-1]
    sorted_token_indices = slot_positions.new_zeros(num_rows)
    sorted_token_indices[slot_positions] = torch.arange(num_slots, device=slot_positions.device) // top_k
    return Dispatch(sorted_token_indices, slot_positions, expert_offsets)


def combine(outputs: Tensor, slot_positions: Tensor, expert_weights: Tensor) -> Tensor:
    """Weigh the experts' rows and add up those of each token.

    The sum over a token's experts runs in the order of its choices, whatever
    computed the rows, so that local and remote experts give the same bits.

    Args:
        outputs: float32 ``[n, H]`` in sorted order.
        slot_positions: from :func:`sort_by_expert`.
        expert_weights: float32 ``[T, K]``.
    Returns:
        float32 ``[T, H]``.
    """
    num_tokens, top_k = expert_weights.shape
    rows = outputs[slot_positions].view(num_tokens, top_k, outputs.shape[-1])  # [T, K, H]
    return (rows * expert_weights.unsqueeze(-1)).sum(dim=1)
