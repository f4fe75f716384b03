import logging

import pytest
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvcache.hf import paged_cache
from kvcache.hf.support import AttentionShape, attention_shape
from moe_bitnet.errors import ConfigError

TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB_SIZE}


def test_shape_of_grouped_heads():
    assert attention_shape(tiny_model(head_dim=80)) == AttentionShape(2, 4, 2, 80)
    assert attention_shape(tiny_model("gpt_neox")) == AttentionShape(2, 4, 4, 32)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("mistral", {"sliding_window": 32}, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "1 of its 2 layers are sliding_attention"),
        ("gemma2", {}, "caps attention scores"),
        ("gemma3_text", {}, "sliding_attention"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "learned sinks"),
        ("deepseek_v3", {**MLA, "n_routed_experts": 8, "head_dim": 32}, "MLA, kv_lora_rank=16"),
        ("llama4_text", {"num_local_experts": 2}, "chunked_attention"),
        ("jamba", {"num_experts": 1}, "linear_attention"),
        ("diffllama", {}, "attends twice"),
        ("bloom", {"n_layer": 1, "n_head": 2}, "does not look up attention functions"),
    ],
)
def test_models_that_attend_otherwise_are_refused_by_name(model_type, settings, reason):
    config = AutoConfig.for_model(model_type, **{**TINY, **settings})
    model = AutoModelForCausalLM.from_config(config)
    used = model.config._attn_implementation
    with pytest.raises(ConfigError, match=rf"\({model_type}\) is not supported.*{reason}"):
        paged_cache(model, 1 << 24)
    assert model.config._attn_implementation == used


def test_encoder_decoders_are_refused():
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        paged_cache(model, 1 << 24)


def test_head_sizes_that_fill_no_words_are_refused():
    with pytest.raises(ConfigError, match="head_dim is 24"):
        paged_cache(tiny_model(head_dim=24), 1 << 24)


def test_an_untested_model_type_is_said(caplog):
    config = AutoConfig.for_model("hunyuan_v1_dense", **TINY)
    with caplog.at_level(logging.WARNING):
        attention_shape(AutoModelForCausalLM.from_config(config))
    assert "hunyuan_v1_dense" in caplog.text
