import json

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig
from cluster.training.attempts import read_attempts
from cluster.training.ray_elastic import allowed_worker_counts
from cluster.training.ray_trainer import train
from cluster.training.run import build_torch_engine, run_training


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"num_workers": 4}, (4,)),
        ({"num_workers": 4, "min_workers": 1}, (1, 2, 3, 4)),
        ({"num_workers": 4, "min_workers": 2}, (2, 3, 4)),
        ({"num_workers": 6, "min_workers": 4}, (4, 6)),
        ({"num_workers": 4, "min_workers": 1, "gradient_accumulation_steps": 3}, (1, 2, 4)),
        ({"num_workers": 2, "min_workers": 1, "gradient_accumulation_steps": 6}, (1, 2)),
        ({"num_workers": 6, "min_workers": 1, "expert_parallel": 2, "zero_stage": 1}, (2, 4, 6)),
    ],
)
def test_only_numbers_that_divide_the_batch_are_allowed(config, settings, counts):
    config = config.replace(batch_size=12)
    assert allowed_worker_counts(config.replace(**settings)) == counts


def losses_of(config):
    lines = [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "every step once, in order"
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.ray
@pytest.mark.slow  # three raylets, and a minute until Ray gives up the third worker
def test_a_killed_node_leaves_the_workers_that_divide_the_batch(model_config, config):
    """Three nodes hold a worker each; of the two that stay, only a number that divides 3 sequences goes on: one."""
    config = config.replace(
        num_workers=3, min_workers=1, batch_size=3, num_steps=400, checkpoint_every_s=0.2, eval_every_steps=400
    )
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        added = [nodes.add_node(num_cpus=1) for _ in range(2)]

        def kill_a_node(line):
            if line["step"] == 10 and len(added) == 2:
                nodes.remove_node(added.pop(), allow_graceful=False)

        summary = train(model_config, config, ClusterConfig(address=nodes.address), on_progress=kill_a_node)
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert summary["num_steps"] == 400
    assert [attempt.num_workers for attempt in read_attempts(config.out_folder)] == [3, 1]
    losses = losses_of(config)
    alone = config.replace(num_workers=1, min_workers=None, out_folder=config.out_folder / "alone")
    run_training(model_config, alone, build_torch_engine(alone), torch.device("cpu"))
    assert losses[:20] == pytest.approx(losses_of(alone)[:20], abs=1e-4)
    assert losses[-1] == pytest.approx(losses_of(alone)[-1], abs=0.1)
