import pytest
import torch

from cluster.training.expert_parallel.division import ExpertDivision
from cluster.training.expert_parallel.visits import visits_of


@pytest.mark.parametrize(("num_experts", "num_workers", "top_k"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (7, 4, 2)])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_every_choice_goes_once_to_its_owner_and_a_row_once_to_a_worker(num_experts, num_workers, top_k, num_tokens):
    division = ExpertDivision(num_experts, num_workers)
    indices = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k]
    for rank in range(num_workers):
        visits = visits_of(indices, division, rank)
        assert visits.counts[rank] == 0
        workers = [worker for worker, count in enumerate(visits.counts) for _ in range(count)]
        rows = list(zip(workers, visits.tokens.tolist(), visits.local_ids.tolist(), strict=True))
        rows += [(rank, *row) for row in zip(visits.own_tokens.tolist(), visits.own_ids.tolist(), strict=True)]
        assert len({(worker, token) for worker, token, _ in rows}) == len(rows)
        found = torch.full_like(indices, -1)
        for worker, token, ids in rows:
            assert max(ids) >= 0, "a row without an expert there"
            for choice, local_id in enumerate(ids):
                if local_id >= 0:
                    assert found[token, choice] == -1
                    found[token, choice] = division.starts[worker] + local_id
        assert torch.equal(found, indices)
