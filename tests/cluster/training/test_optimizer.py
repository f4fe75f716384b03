import pytest
import torch

from cluster.training.optimizer import (
    build_optimizer,
    freeze_backbone,
    is_decayed,
    parameter_groups,
    set_step_size,
)
from moe_bitnet.model import MoETransformer


@pytest.fixture
def model(model_config):
    torch.manual_seed(0)
    return MoETransformer(model_config)


@pytest.mark.parametrize("norm_recipe", ["sub_norm", "inner_norm"])
def test_projections_and_experts_decay_and_nothing_else(model_config, norm_recipe, precision):
    model = MoETransformer(
        model_config.replace(norm_recipe=norm_recipe, precision=precision, has_tied_embeddings=False)
    )
    decayed = {name for name, _ in model.named_parameters() if is_decayed(name)}
    expected = {f"blocks.{i}.attention.{p}_proj.weight" for i in range(2) for p in "qkvo"} | {
        f"blocks.{i}.moe.{kind}.{p}_weight"
        for i in range(2)
        for kind in ("experts", "shared_experts")
        for p in ("gate", "up", "down")
    }
    assert decayed == expected
    groups = build_optimizer(parameter_groups(model), 0.9, 0.95).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {len(group["params"]) for group in groups if group["is_decayed"]} == {len(expected)}


def test_step_size_reaches_all_groups(model):
    optimizer = build_optimizer(parameter_groups(model), 0.9, 0.95)
    set_step_size(optimizer, 0.25, 0.1)
    step_sizes = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert step_sizes == [(0.25, 0.1), (0.25, 0.0), (0.25, 0.0)]


def test_routers_warm_up_alone(model):
    optimizer = build_optimizer(parameter_groups(model), 0.9, 0.95)
    set_step_size(optimizer, 0.25, 0.1, router_warmup=0.5)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (0.125 if "router" in name else 0.25), name


def test_a_frozen_backbone_leaves_experts_and_routers(model):
    freeze_backbone(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    experts = {f"experts.{name}_weight" for name in ("gate", "up", "down", "norm")}
    assert trained == {f"blocks.{i}.moe.{name}" for i in range(2) for name in (*experts, "router.weight")}
    groups = build_optimizer(parameter_groups(model), 0.9, 0.95).param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
