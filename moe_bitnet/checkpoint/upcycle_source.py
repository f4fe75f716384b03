"""A dense LLaMA-like model as a :class:`MoETransformer`, exactly: where upcycling starts.

The settings and tensors that Hugging Face's ``LlamaForCausalLM`` has enter. What leaves is a model with a float
backbone whose one shared expert in each layer is the dense feed-forward network, beside one silent routed expert of
width 1, since a layer always has one. Names are translated here and nowhere else; transformers is not needed.

What would compute something else (biases, norms of queries and keys, scaled rotary embedding, sliding windows,
mixtures) is refused by name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.model import MoETransformer

_MODEL_TYPES = ("llama", "mistral")
_ACTIVATIONS = ("silu", "swish")
_IN_LAYER = {  # ours → theirs
    "attention.norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "moe.norm.weight": "post_attention_layernorm.weight",
    "moe.shared_experts.gate_weight": "mlp.gate_proj.weight",
    "moe.shared_experts.up_weight": "mlp.up_proj.weight",
    "moe.shared_experts.down_weight": "mlp.down_proj.weight",
}
_OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_HEAD = "lm_head.weight"
_BUFFER = "rotary_emb.inv_freq"  # old checkpoints hold it; it follows from the config


def dense_model(values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> MoETransformer:
    """Build the dense model; its logits are those of the source, to float32 rounding.

    Args:
        values: what ``config.json`` of the source holds.
        tensors: its state, by its names; shared, not copied, where they are float32 already.
        source: what to call it in an error.
    Returns:
        a model in evaluation mode, in float32.
    Raises:
        ConfigError: the source is not LLaMA-like.
        CheckpointError: tensors are missing, unknown or of another shape.
    """
    config = dense_config(values, source)
    with torch.device("meta"):
        model = MoETransformer(config)
    model.load_state_dict(_state(model, tensors, source), assign=True)
    return model.eval().requires_grad_(True)


def dense_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """Translate the settings of a LLaMA-like model.

    Raises:
        ConfigError: the source is something else; the message names what.
    """
    if reasons := list(_reasons(values)):
        raise ConfigError(
            f"{source}: cannot be upcycled: {'; '.join(reasons)}. Give a dense LLaMA-like model (LlamaForCausalLM "
            f"with SwiGLU, RMSNorm and plain rotary embedding)."
        )
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "shared_intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
    }
    if missing := sorted(theirs for theirs in names.values() if values.get(theirs) is None):
        raise ConfigError(f"{source}: has no {', '.join(missing)}. Give the config.json of a LLaMA-like model.")
    return ModelConfig(
        **{ours: values[theirs] for ours, theirs in names.items()},
        num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_dim=values.get("head_dim") or 0,
        intermediate_size=1,
        num_shared_experts=1,
        precision="float",
        rope_theta=_rotary(values).get("rope_theta") or values.get("rope_theta") or 10_000.0,
        has_tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        has_float_backbone=True,
    )


def _reasons(values: Mapping[str, Any]) -> Iterator[str]:
    model_type = values.get("model_type")
    if model_type not in _MODEL_TYPES:
        yield f"model_type is {model_type!r}; supported are {', '.join(_MODEL_TYPES)}"
    if values.get("hidden_act", "silu") not in _ACTIVATIONS:
        yield f"hidden_act is {values['hidden_act']!r}, not silu"
    for setting in ("attention_bias", "mlp_bias"):
        if values.get(setting):
            yield f"its projections have biases ({setting})"
    for setting in ("num_local_experts", "num_experts", "n_routed_experts"):
        if values.get(setting):
            yield f"it is a mixture already ({setting}={values[setting]})"
    rotary = _rotary(values)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default":
        yield f"its rotary embedding is scaled (rope_type={kind!r})"
    if rotary.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "it rotates a part of each head (partial_rotary_factor)"
    if values.get("sliding_window") is not None:
        yield f"it attends to a sliding window (sliding_window={values['sliding_window']})"


def _rotary(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the rotary embedding, under their new name or the old one."""
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), Mapping):
            found: Mapping[str, Any] = values[name]
            return found
    return {}


def _state(model: MoETransformer, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    names = _names(model.config)
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFER)}
    if model.config.has_tied_embeddings:
        given.pop(_HEAD, None)
    missing, unknown = sorted(set(names.values()) - given.keys()), sorted(given.keys() - set(names.values()))
    if missing or unknown:
        raise CheckpointError(
            f"{source}: its tensors are not those of a LLaMA-like model; missing {missing[:3]}, unknown {unknown[:3]}. "
            f"Give a dense model without biases and without norms of queries and keys."
        )
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items() if name not in names}
    for name, tensor in model.state_dict().items():
        if name not in names:
            continue
        value = given[names[name]].detach().float()
        value = value[None] if ".shared_experts." in name else value  # one expert
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {names[name]} is {list(given[names[name]].shape)}, its config needs "
                f"{list(tensor.shape[-2:])}. Config and tensors belong to different models."
            )
        state[name] = value
    return state


def _names(config: ModelConfig) -> dict[str, str]:
    """Return their name of each of our tensors that they have."""
    layers = {
        f"blocks.{index}.{ours}": f"model.layers.{index}.{theirs}"
        for index in range(config.num_layers)
        for ours, theirs in _IN_LAYER.items()
    }
    return {**_OUTSIDE, **layers, **({} if config.has_tied_embeddings else {_HEAD: _HEAD})}
