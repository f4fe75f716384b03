"""A Hugging Face ``config.json`` as a :class:`ModelShape`: the only place that knows its names.

A model whose sizes these are not, or that the paged cache does not compute where that is asked for, is refused with its
name and the reason. The file is read as plain JSON; transformers is not needed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_bitnet.cli.planning.model_shape import LatentAttention, ModelShape
from moe_bitnet.errors import ConfigError

# Settings of models in which some layers keep a state instead of keys and values.
_STATE_SETTINGS = (
    "attn_layer_period",
    "block_types",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layers_block_type",
    "mamba_d_state",
    "ssm_cfg",
    "state_size",
)
# Settings by which only every n-th layer has experts.
_STRIDE_SETTINGS = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq")
_WITHOUT_GATE = frozenset(("gpt_neox", "phi", "starcoder2"))


def shape_from_config(values: Mapping[str, Any], source: str, has_cache: bool = True) -> ModelShape:
    """Read the sizes of a model.

    Args:
        values: what ``config.json`` holds.
        source: what to call it in an error.
        has_cache: whether tokens will be cached; without, attention may look at fewer tokens than all.
    Raises:
        ConfigError: the model is not supported, or sizes are missing.
    """
    text = values.get("text_config", values)
    if not isinstance(text, Mapping):
        raise ConfigError(f"{source}: text_config is {text!r}; give the config.json of a language model.")
    name = str(text.get("model_type") or values.get("model_type") or "a model without model_type")
    reasons = [*_reasons_of_sizes(values, text), *(_reasons_of_cache(text) if has_cache else ())]
    if reasons:
        raise ConfigError(
            f"{source}: {name} is not supported: {'; '.join(reasons)}. Supported are decoders with full causal "
            f"attention in all layers and equal heads, such as LLaMA, Qwen3 and Mixtral."
        )
    return _shape(_Sizes(text, source), name)


def _reasons_of_sizes(values: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[str]:
    if values.get("is_encoder_decoder"):
        yield "it is an encoder-decoder, with a second cache for cross attention"
    if not text.get("kv_lora_rank") and text.get("v_head_dim") and text.get("v_head_dim") != text.get("head_dim"):
        yield "its keys and values have heads of unequal sizes"
    if settings := sorted(set(_STATE_SETTINGS) & text.keys()):
        yield f"not all of its layers keep keys and values ({', '.join(settings)})"
    if text.get("num_kv_shared_layers"):
        yield "some of its layers use the keys and values of others"
    for setting in _STRIDE_SETTINGS:
        if text.get(setting) not in (None, 1):
            yield f"not all of its layers hold experts ({setting}={text[setting]})"


def _reasons_of_cache(text: Mapping[str, Any]) -> Iterator[str]:
    if text.get("attn_logit_softcapping"):
        yield f"it caps attention scores (attn_logit_softcapping={text['attn_logit_softcapping']})"
    layer_types = text.get("layer_types")
    if isinstance(layer_types, list):
        for layer_type in sorted({str(each) for each in layer_types} - {"full_attention"}):
            yield f"{layer_types.count(layer_type)} of its {len(layer_types)} layers are {layer_type}"
        return
    # Qwen's configs name a window that is not used unless they say so
    uses_window = text.get("use_sliding_window", not str(text.get("model_type")).startswith("qwen"))
    if text.get("sliding_window") is not None and uses_window:
        yield f"its layers attend to a sliding window (sliding_window={text['sliding_window']})"
    if text.get("attention_chunk_size") is not None:
        yield f"its layers attend in chunks (attention_chunk_size={text['attention_chunk_size']})"


class _Sizes:
    """Sizes by name, checked."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def first(self, *names: str, default: int | None = None) -> int:
        """Return the first size that is given."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{self._source}: {name} is {value!r}; it must be an integer of at least 0.")
            return value
        if default is None:
            raise ConfigError(f"{self._source}: has no {' or '.join(names)}. Give the config.json of a decoder.")
        return default

    def positive(self, *names: str, default: int | None = None) -> int:
        """Return the first size that is given, at least 1."""
        value = self.first(*names, default=default)
        if value < 1:
            raise ConfigError(f"{self._source}: {names[0]} is {value}; it must be at least 1.")
        return value

    def is_set(self, name: str) -> bool:
        return bool(self._values.get(name))

    def list_len(self, name: str) -> int:
        value = self._values.get(name)
        return len(value) if isinstance(value, list) else 0


def _shape(sizes: _Sizes, name: str) -> ModelShape:
    num_layers = sizes.positive("num_hidden_layers")
    num_heads = sizes.positive("num_attention_heads")
    hidden_size = sizes.positive("hidden_size")
    num_experts = sizes.first("num_local_experts", "num_experts", "n_routed_experts", default=1) or 1
    dense_size = sizes.positive("intermediate_size")
    expert_size = sizes.positive("moe_intermediate_size", default=dense_size) if num_experts > 1 else dense_size
    num_shared = sizes.first("n_shared_experts", "num_shared_experts", default=0)
    latent = _latent(sizes) if sizes.is_set("kv_lora_rank") else None
    query_head_dim = latent.plain_head_dim + latent.rope_head_dim if latent else hidden_size // num_heads
    num_dense = sizes.first("first_k_dense_replace", default=sizes.list_len("mlp_only_layers"))
    return ModelShape(
        vocab_size=sizes.positive("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=sizes.positive("num_key_value_heads", default=num_heads),
        head_dim=query_head_dim if latent else sizes.positive("head_dim", default=query_head_dim),
        intermediate_size=expert_size,
        num_experts=num_experts,
        top_k=sizes.positive("num_experts_per_tok", default=1),
        shared_intermediate_size=sizes.first("shared_expert_intermediate_size", default=num_shared * expert_size),
        num_dense_layers=min(num_dense, num_layers) if num_experts > 1 else 0,
        dense_intermediate_size=dense_size if num_experts > 1 and num_dense else 0,
        has_gate=name not in _WITHOUT_GATE,
        has_tied_embeddings=sizes.is_set("tie_word_embeddings"),
        max_seq_len=sizes.first("max_position_embeddings", default=0),
        latent=latent,
    )


def _latent(sizes: _Sizes) -> LatentAttention:
    return LatentAttention(
        query_latent_size=sizes.first("q_lora_rank", default=0),
        kv_latent_size=sizes.positive("kv_lora_rank"),
        rope_head_dim=sizes.first("qk_rope_head_dim"),
        plain_head_dim=sizes.positive("qk_nope_head_dim"),
        value_head_dim=sizes.positive("v_head_dim"),
    )
