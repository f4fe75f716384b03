"""AdamW over three groups of parameters.

Weight decay applies to the matrices that BitNet makes ternary: attention
projections and experts. Norms, routers, the embedding and the head have none. Routers are a group of their own, since
their learning rate may warm up later. The twin has the same groups, so that precision stays the only difference.
"""

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from moe_bitnet.checkpoint.native import is_routed_expert

_DECAYED_SUFFIXES = (
    *(f"{name}_proj.weight" for name in ("q", "k", "v", "o")),
    *(f"experts.{name}_weight" for name in ("gate", "up", "down")),
)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Divide a model's trainable parameters into those with weight decay, those without, and routers.

    Returns:
        groups for a torch optimizer, none of them empty; ``is_decayed`` and ``is_router`` tell them apart.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "is_decayed": True, "is_router": False},
        {"params": [], "is_decayed": False, "is_router": False},
        {"params": [], "is_decayed": False, "is_router": True},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[0 if is_decayed(name) else 2 if is_router(name) else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def freeze_backbone(model: nn.Module) -> None:
    """Leave the routed experts, their norms and the routers alone trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_router(name) or is_routed_expert(name))


def is_decayed(parameter_name: str) -> bool:
    """Return whether a parameter has weight decay."""
    return parameter_name.endswith(_DECAYED_SUFFIXES)


def is_router(parameter_name: str) -> bool:
    """Return whether a parameter is that of a router."""
    return ".moe.router." in parameter_name


def build_optimizer(groups: list[dict[str, Any]], adam_beta1: float, adam_beta2: float) -> AdamW:
    """Make the optimizer of :func:`parameter_groups`, whose groups may have been divided further.

    Learning rate and weight decay are set before each step by :func:`set_step_size`. ``fused`` reads and
    writes each number once, on CPU and GPU alike: 21 ms against 130 ms of ``foreach`` for 39 million parameters on one
    core.
    """
    return AdamW(groups, lr=0.0, betas=(adam_beta1, adam_beta2), weight_decay=0.0, fused=True)


def set_step_size(optimizer: Optimizer, learning_rate: float, weight_decay: float, router_warmup: float = 1.0) -> None:
    """Set what the next step of the optimizer uses; the routers' learning rate is multiplied by ``router_warmup``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * router_warmup if group["is_router"] else learning_rate
        group["weight_decay"] = weight_decay if group["is_decayed"] else 0.0
