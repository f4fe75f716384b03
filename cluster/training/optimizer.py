"""AdamW over three groups of parameters, and its state by parameter name.

Weight decay applies to the matrices that BitNet makes ternary: attention
projections and experts. Norms, routers, the embedding and the head have none. Routers are a group of their own, since
their learning rate may warm up later. The twin has the same groups, so that precision stays the only difference.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from moe_bitnet.errors import CheckpointError

_DECAYED_SUFFIXES = (
    *(f"{name}_proj.weight" for name in ("q", "k", "v", "o")),
    *(f"experts.{name}_weight" for name in ("gate", "up", "down")),
)
_STATE_FIELDS = ("step", "exp_avg", "exp_avg_sq")


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
        parameter.requires_grad_(is_router(name) or ".moe.experts." in name)


def is_decayed(parameter_name: str) -> bool:
    """Return whether a parameter has weight decay."""
    return parameter_name.endswith(_DECAYED_SUFFIXES)


def is_router(parameter_name: str) -> bool:
    """Return whether a parameter is that of a router."""
    return ".moe.router." in parameter_name


def build_optimizer(model: nn.Module, adam_beta1: float, adam_beta2: float) -> AdamW:
    """Make the optimizer; learning rate and weight decay are set before each step by :func:`set_step_size`.

    ``foreach`` updates all parameters of a group in few calls; it needs no compiler, on CPU and GPU alike.
    """
    return AdamW(parameter_groups(model), lr=0.0, betas=(adam_beta1, adam_beta2), weight_decay=0.0, foreach=True)


def set_step_size(optimizer: Optimizer, learning_rate: float, weight_decay: float, router_warmup: float = 1.0) -> None:
    """Set what the next step of the optimizer uses; the routers' learning rate is multiplied by ``router_warmup``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * router_warmup if group["is_router"] else learning_rate
        group["weight_decay"] = weight_decay if group["is_decayed"] else 0.0


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by name: ``<parameter>.step``, ``.exp_avg`` and ``.exp_avg_sq``.

    Empty before the first step.
    """
    return {
        f"{name}.{field}": torch.as_tensor(optimizer.state[parameter][field]).detach()
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
        for field in _STATE_FIELDS
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put back what :func:`optimizer_tensors` returned.

    Args:
        model: whose parameters the optimizer updates.
        optimizer: fresh, from :func:`build_optimizer`.
        tensors: of all parameters.
        source: what to call the input in an error.
    Raises:
        CheckpointError: tensors are missing, unknown or of another shape.
    """
    parameters = dict(model.named_parameters())
    expected = {f"{name}.{field}" for name in parameters for field in _STATE_FIELDS}
    if expected != tensors.keys():
        different = sorted(expected ^ tensors.keys())
        raise CheckpointError(f"{source}: the optimizer's tensors do not fit the model (first: {different[0]}).")
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {"step": tensors[f"{name}.step"].clone()}  # stays on the CPU, as AdamW keeps it
        for field in ("exp_avg", "exp_avg_sq"):
            tensor = tensors[f"{name}.{field}"]
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{source}: {name}.{field} is {list(tensor.shape)}, the parameter is {list(parameter.shape)}. "
                    f"The optimizer's state belongs to another model."
                )
            state[field] = tensor.to(parameter.device, torch.float32, copy=True)
        optimizer.state[parameter] = state
