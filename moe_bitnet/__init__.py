"""Ternary (1.58-bit) Mixture-of-Experts language models with long context.

The names below are the public interface; everything else can be imported by its
module path and may change.
"""

from moe_bitnet.bitlinear import BitLinear
from moe_bitnet.checkpoint.native import load_model, save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.config import ModelConfig
from moe_bitnet.generation import generate
from moe_bitnet.model import MoETransformer

__all__ = ["BitLinear", "MoETransformer", "ModelConfig", "generate", "load_model", "pack_model", "save_model"]
