"""Bytes of a trained model as it would be stored, by precision; every float that stays float has 16 bits.

Real packed layouts are weighed with their padding and scales (2-bit and base-3). Binary weights are counted at one
bit, which no file of this project has: packed, they take the ternary layouts. 4-bit weights are counted with a
16-bit scale for each group.
"""

from typing import get_args

import torch

from moe_bitnet.checkpoint.native import is_matrix, is_routed_expert
from moe_bitnet.checkpoint.pack import packed_skeleton
from moe_bitnet.config import ModelConfig
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import Layout
from moe_bitnet.quantization import INT4_GROUP_SIZE

FLOAT_BITS = 16
INT4_BITS = 4 + FLOAT_BITS / INT4_GROUP_SIZE


def stored_forms(config: ModelConfig) -> dict[str, int]:
    """Return the bytes of each form that a model of this shape and precision can be stored in, by its name."""
    if config.precision == "ternary":
        return {f"ternary {layout}": stored_bytes(config, layout) for layout in get_args(Layout)}
    name = {"float": "FP16", "int4-experts": "int4 experts", "binary": "binary"}[config.precision]
    return {name: stored_bytes(config)}


def stored_bytes(config: ModelConfig, layout: Layout = "base3") -> int:
    """Return the bytes of all tensors of a model, embedding included; nothing is allocated.

    Args:
        config: shape and precision.
        layout: of ternary weights.
    """
    with torch.device("meta"):
        model = MoETransformer(config)
    if config.precision == "ternary":
        packed_skeleton(model, layout)
    bits: float = sum(tensor.numel() * _bits(name, tensor, config) for name, tensor in model.state_dict().items())
    return round(bits / 8)


def _bits(name: str, tensor: torch.Tensor, config: ModelConfig) -> float:
    if not tensor.is_floating_point():
        return 8.0  # packed bytes
    is_routed = is_routed_expert(name)
    is_quantized = is_routed or not config.has_float_backbone
    is_table = name.endswith(("embedding.weight", "lm_head.weight"))
    if config.precision == "binary" and is_matrix(name) and is_quantized and not is_table:
        return 1.0
    if config.precision == "int4-experts" and is_matrix(name) and is_routed:
        return INT4_BITS
    return FLOAT_BITS
