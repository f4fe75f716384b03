"""From latent weights to packed ternary ones.

A trained model enters, the same model with :class:`PackedBitLinear` and
:class:`PackedExperts` in place of the latent layers leaves. Its integers are those
of training; without gradients its logits are those of the latent model, bit for bit.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from moe_bitnet.attention import Attention
from moe_bitnet.bitlinear import BitLinear, PackedBitLinear
from moe_bitnet.errors import CheckpointError
from moe_bitnet.experts import BitExperts, GroupedExperts, PackedExperts
from moe_bitnet.layers import RMSNorm
from moe_bitnet.model import MoETransformer
from moe_bitnet.moe import MoELayer
from moe_bitnet.packed_module import PackedModule, arrange_weights
from moe_bitnet.packing import Layout, check_layout

_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERT_GROUPS = ("experts", "shared_experts")


def pack_model(model: MoETransformer, layout: Layout = "2bit") -> MoETransformer:
    """Quantize and pack every BitLinear and expert of a trained ternary (or binary) model.

    A float backbone stays float.

    Args:
        model: with latent weights; stays as it is.
        layout: ``"2bit"`` (2 bits a weight) or ``"base3"`` (1.6 bits).
    Returns:
        a new model in evaluation mode, its weights laid out for the kernels.
    Raises:
        CheckpointError: the model is a float twin, is packed already, or its experts are elsewhere.
        ConfigError: the layout is unknown.
    """
    check_layout(layout)
    require_local_experts(model)
    if not model.config.is_packable:
        raise CheckpointError(
            f"pack: the model's precision is {model.config.precision!r}; only 'ternary' and 'binary' models can be "
            f"packed. Train one with --precision ternary."
        )
    if model_layout(model) is not None:
        raise CheckpointError(
            f"pack: the model is packed already (layout {model_layout(model)}). Give the trained one."
        )
    packed = _replace_layers(
        copy.deepcopy(model),
        lambda linear: PackedBitLinear.from_bitlinear(linear, layout),
        lambda experts: PackedExperts.from_experts(experts, model.config, layout),
    )
    arrange_weights(packed)
    return packed.eval()


def packed_skeleton(model: MoETransformer, layout: Layout) -> None:
    """Turn a model without weights (on the meta device) into a packed one without weights, in place."""

    def linear(latent: BitLinear) -> PackedBitLinear:
        out_features, in_features = latent.weight.shape
        eps = latent.norm.eps if isinstance(latent.norm, RMSNorm) else None
        return PackedBitLinear(in_features, out_features, layout, eps)

    with torch.device("meta"):
        _replace_layers(
            model,
            linear,
            lambda experts: PackedExperts(model.config, experts.num_experts, layout, experts.is_shared),
        )


def model_layout(model: MoETransformer) -> Layout | None:
    """Return how a model's ternary weights are packed, or ``None`` if they are latent or float."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            return module.layout
    return None


def require_local_experts(model: MoETransformer) -> None:
    """Check that the model's own experts are in place.

    Raises:
        CheckpointError: they were replaced by other executors, so their weights are not here.
    """
    for module in model.modules():
        if isinstance(module, MoELayer) and not isinstance(module.experts, GroupedExperts):
            raise CheckpointError(
                "the model's experts were replaced by other executors, so their weights are not here. "
                "Load the checkpoint again and use that model."
            )


def _replace_layers(
    model: MoETransformer,
    linear: Callable[[BitLinear], nn.Module],
    experts: Callable[[BitExperts], nn.Module],
) -> MoETransformer:
    for module in model.modules():
        if isinstance(module, Attention):
            for name in _ATTENTION_PROJECTIONS:
                projection = getattr(module, name)
                if isinstance(projection, BitLinear):  # those of a float backbone stay
                    setattr(module, name, linear(projection))
        elif isinstance(module, MoELayer):
            for name in _EXPERT_GROUPS:
                group = getattr(module, name, None)
                if isinstance(group, BitExperts):
                    setattr(module, name, experts(group))
    return model
