import pytest

from cluster.training.expert_parallel.division import ExpertDivision, check_expert_parallel
from moe_bitnet.errors import ConfigError


@pytest.mark.parametrize(("num_experts", "num_workers"), [(1, 1), (4, 2), (5, 2), (7, 4), (33, 7)])
def test_every_expert_has_one_owner_and_workers_have_as_many_as_others(num_experts, num_workers):
    division = ExpertDivision(num_experts, num_workers)
    assert len(division.owners) == sum(division.counts) == num_experts
    assert max(division.counts) - min(division.counts) <= 1
    assert min(division.counts) >= 1
    for expert_id, owner in enumerate(division.owners):
        assert division.starts[owner] <= expert_id < division.starts[owner + 1]


def test_more_workers_than_experts_are_refused(model_config, config):
    config = config.replace(num_workers=8, batch_size=8, expert_parallel=8, zero_stage=1)
    check_expert_parallel(model_config.replace(num_experts=8), config)
    with pytest.raises(
        ConfigError, match="expert_parallel 8 leaves workers without an expert: the model's num_experts is 4"
    ):
        check_expert_parallel(model_config, config)
