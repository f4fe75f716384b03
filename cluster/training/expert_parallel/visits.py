"""Which rows of a batch go where: one for each (token, worker), however many experts of the worker the token visits.

Rows are ordered by worker, then by token. Beside each go the ids of its experts there, counted from the worker's
first expert, in the order of the token's choices; :data:`NO_EXPERT` marks the choices that are elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.training.expert_parallel.division import ExpertDivision

NO_EXPERT = -1


@dataclass(frozen=True, eq=False)
class Visits:
    """The rows that one worker's tokens need of all workers.

    Attributes:
        tokens: int64 ``[n]``, the token of each row that goes to another worker.
        local_ids: int64 ``[n, K]``, its experts there.
        counts: rows for each worker of the group, ``[D]``; 0 for this one.
        own_tokens: int64 ``[m]``, tokens that visit this worker's experts.
        own_ids: int64 ``[m, K]``, their experts here.
    """

    tokens: Tensor
    local_ids: Tensor
    counts: list[int]
    own_tokens: Tensor
    own_ids: Tensor


def visits_of(expert_indices: Tensor, division: ExpertDivision, rank: int) -> Visits:
    """Find the rows that a batch needs.

    Args:
        expert_indices: int64 ``[T, K]``.
        division: of the layer's experts.
        rank: of this worker in the group.
    """
    device = expert_indices.device
    owners = torch.tensor(division.owners, device=device)[expert_indices]  # [T, K]
    is_visited = torch.zeros(len(expert_indices), division.num_workers, dtype=torch.bool, device=device)
    is_visited.scatter_(1, owners, True)
    own_tokens = is_visited[:, rank].nonzero().squeeze(1)
    is_visited[:, rank] = False
    workers, tokens = is_visited.t().nonzero().unbind(1)
    own_worker = torch.full_like(own_tokens, rank)
    starts = torch.tensor(division.starts, device=device)

    def ids_at(tokens: Tensor, workers: Tensor) -> Tensor:
        ids = expert_indices[tokens] - starts[workers].unsqueeze(1)
        return ids.where(owners[tokens] == workers.unsqueeze(1), NO_EXPERT)

    return Visits(
        tokens, ids_at(tokens, workers), is_visited.sum(dim=0).tolist(), own_tokens, ids_at(own_tokens, own_worker)
    )
