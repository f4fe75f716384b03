"""Which models of transformers a paged cache fits, and the sizes of their attention.

In: a model. Out: its ``AttentionShape``, or an error that names the model and the reason.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_bitnet.errors import ConfigError

logger = logging.getLogger(__name__)

# Those whose tokens are compared with the plain model's in tests/kvcache/hf.
TESTED_MODEL_TYPES = frozenset({
    "arcee", "cohere", "ernie4_5", "gemma", "glm", "glm4", "glm4_moe", "gpt_neox", "granite", "granitemoe", "llama",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
# What neither settings nor modules tell.
_SPECIAL_MODEL_TYPES = {
    "diffllama": "each layer attends twice (differential attention)",
    "doge": "its masks depend on values",
}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that every layer of a model shares.

    Attributes:
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: G.
        head_dim: D.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def attention_shape(model: Any) -> AttentionShape:
    """Return the sizes of a model's attention.

    Args:
        model: a causal language model of transformers.

    Raises:
        ConfigError: the model attends in a way that the cache does not compute.
    """
    config = model.config.get_text_config(decoder=True)
    reasons = [*_reasons_of_config(model, config), *_reasons_of_modules(model)]
    if reasons:
        raise ConfigError(
            f"paged_cache: {type(model).__name__} ({config.model_type}) is not supported: {'; '.join(reasons)}. "
            f"Supported are decoders with full causal attention and equal heads, such as LLaMA, Qwen2, Qwen3 and "
            f"Mixtral; use transformers' DynamicCache with this one."
        )
    if config.model_type not in TESTED_MODEL_TYPES:
        logger.warning("paged_cache: model type %s is not among the tested ones; compare outputs.", config.model_type)
    num_heads = config.num_attention_heads
    return AttentionShape(
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )


def _reasons_of_config(model: Any, config: Any) -> Iterator[str]:
    """Yield why the settings rule out a paged cache."""
    if config.model_type in _SPECIAL_MODEL_TYPES:
        yield _SPECIAL_MODEL_TYPES[config.model_type]
    if config.is_encoder_decoder or model.config.is_encoder_decoder:
        yield "it is an encoder-decoder, with a second cache for cross attention"
    if getattr(config, "kv_lora_rank", None):
        yield f"it caches latent vectors (MLA, kv_lora_rank={config.kv_lora_rank}), not keys and values of heads"
    elif _differs(config, "v_head_dim") or _differs(config, "global_head_dim"):
        yield "its heads have unequal sizes"
    yield from _reasons_of_layers(config)
    if getattr(config, "attn_logit_softcapping", None):
        yield f"it caps attention scores (attn_logit_softcapping={config.attn_logit_softcapping})"
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        yield "some of its layers use the keys and values of others"
    if getattr(config, "is_heterogeneous", False):
        yield "its layers have unequal sizes"
    if getattr(config, "is_causal", True) is False:
        yield "its attention is not causal"


def _differs(config: Any, name: str) -> bool:
    size = getattr(config, name, None)
    return bool(size) and size != getattr(config, "head_dim", None)


def _reasons_of_layers(config: Any) -> Iterator[str]:
    """Yield why the pattern of layers rules it out."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        if getattr(config, "sliding_window", None) is not None:
            yield f"its layers attend to a sliding window (sliding_window={config.sliding_window})"
        if getattr(config, "attention_chunk_size", None) is not None:
            yield f"its layers attend in chunks (attention_chunk_size={config.attention_chunk_size})"
        return
    for layer_type in sorted(set(layer_types) - {"full_attention"}):
        yield f"{list(layer_types).count(layer_type)} of its {len(layer_types)} layers are {layer_type}"


def _reasons_of_modules(model: Any) -> Iterator[str]:
    """Yield why the code of the model rules it out."""
    if any(hasattr(module, "sinks") for module in model.modules()):
        yield "its attention has learned sinks"
    if not model._can_set_attn_implementation():
        yield "its code does not look up attention functions by name (AttentionInterface)"
