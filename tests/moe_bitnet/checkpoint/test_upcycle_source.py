import pytest
import torch
from factories import random_token_ids
from llama_factory import tiny_llama

from moe_bitnet.checkpoint.upcycle_source import dense_config, dense_model
from moe_bitnet.errors import CheckpointError, ConfigError


def convert(llama):
    return dense_model(llama.config.to_dict(), llama.state_dict(), "tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 33},
        {"num_hidden_layers": 1, "rms_norm_eps": 1e-2},
    ],
)
@torch.no_grad()
def test_the_dense_model_gives_the_logits_of_transformers(changes):
    llama = tiny_llama(**changes)
    token_ids = random_token_ids(2, 17)
    expected = llama(token_ids).logits
    truth = llama.double()(token_ids).logits
    actual = convert(llama.float())(token_ids).logits
    # what float32 costs transformers itself, against float64, is what it may cost here
    assert (actual - truth).abs().max() <= 2 * (expected - truth).abs().max() + 2e-6 * truth.abs().max()


@torch.no_grad()
def test_half_precision_is_widened_without_loss():
    llama = tiny_llama().bfloat16()
    model = convert(llama)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert torch.equal(model.embedding.weight, llama.model.embed_tokens.weight.float())


def test_the_settings_arrive():
    config = dense_config(tiny_llama(tie_word_embeddings=False).config.to_dict(), "tiny")
    assert (config.hidden_size, config.shared_intermediate_size, config.num_layers) == (24, 40, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_seq_len) == (6, 2, 4, 64)
    assert (config.rope_theta, config.norm_eps) == (1234.0, 1e-6)
    assert config.has_float_backbone
    assert not config.has_tied_embeddings


def test_rotary_settings_of_old_configs_are_read():
    values = tiny_llama().config.to_dict()
    values.pop("rope_parameters")
    assert dense_config({**values, "rope_theta": 77.0, "rope_scaling": None}, "old").rope_theta == 77.0
    assert dense_config(values, "older").rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture already"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of each head"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
    ],
)
def test_what_is_not_llama_like_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match="tiny: cannot be upcycled") as caught:
        dense_config({**tiny_llama().config.to_dict(), **changes}, "tiny")
    assert named in str(caught.value)


def test_missing_settings_are_named():
    values = tiny_llama().config.to_dict()
    del values["rms_norm_eps"], values["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size, rms_norm_eps"):
        dense_config(values, "tiny")


def test_tensors_that_a_llama_does_not_have_are_refused():
    llama = tiny_llama()
    state = {**llama.state_dict(), "model.layers.0.self_attn.q_norm.weight": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"unknown \['model.layers.0.self_attn.q_norm.weight'\]"):
        dense_model(llama.config.to_dict(), state, "tiny")
    state = llama.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\]"):
        dense_model(llama.config.to_dict(), state, "tiny")


def test_a_tensor_of_another_shape_is_named():
    llama = tiny_llama()
    state = {**llama.state_dict(), "model.layers.1.mlp.up_proj.weight": torch.zeros(39, 24)}
    with pytest.raises(CheckpointError, match=r"up_proj.weight is \[39, 24\], its config needs \[40, 24\]"):
        dense_model(llama.config.to_dict(), state, "tiny")
