import dataclasses

import pytest

from moe_bitnet.cli.planning.hugging_face import shape_from_config
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.errors import ConfigError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "mlp_only_layers": [],
    "sliding_window": None,
    "use_sliding_window": False,
    "max_position_embeddings": 40_960,
}


def test_configs_become_the_known_shapes():
    assert shape_from_config(LLAMA, "c") == KNOWN_SHAPES["llama-3-8b"]
    assert shape_from_config(QWEN3_MOE, "c") == KNOWN_SHAPES["qwen3-30b-a3b"]
    mixtral = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32_000}
    expected = dataclasses.replace(KNOWN_SHAPES["mixtral-8x7b"], max_seq_len=8192)
    assert shape_from_config({**mixtral, "sliding_window": None}, "c") == expected


def test_the_text_part_of_a_larger_model_counts():
    assert shape_from_config({"model_type": "llava", "text_config": LLAMA}, "c") == KNOWN_SHAPES["llama-3-8b"]


def test_a_window_that_is_switched_off_is_none():
    qwen2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 131_072}
    for changes in ({}, {"use_sliding_window": False}, {"layer_types": ["full_attention"] * 32}):
        assert shape_from_config({**qwen2, **changes}, "c").num_layers == 32


def test_dense_and_shared_parts_of_a_mixture_are_counted():
    sizes = {"first_k_dense_replace": 3, "num_shared_experts": 2}
    shape = shape_from_config({**QWEN3_MOE, **sizes}, "c")
    assert (shape.num_dense_layers, shape.dense_intermediate_size, shape.shared_intermediate_size) == (3, 6144, 1536)
    plain = KNOWN_SHAPES["qwen3-30b-a3b"]
    more = 3 * 2048 * (3 * (6144 - 128 * 768) + 45 * 2 * 768) - 3 * 128 * 2048  # dense layers have no router
    assert shape.num_weights == plain.num_weights + more


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163_840,
}


def test_latent_attention_has_sizes_of_its_own():
    assert shape_from_config(DEEPSEEK_V3, "c") == KNOWN_SHAPES["deepseek-v3"]
    lite = shape_from_config({**DEEPSEEK_V3, "q_lora_rank": None}, "c")
    assert lite.num_attention_weights - KNOWN_SHAPES["deepseek-v3"].num_attention_weights == (
        7168 * 128 * 192 - 1536 * (7168 + 128 * 192)
    )
    with pytest.raises(ConfigError, match="has no qk_rope_head_dim"):
        shape_from_config({**DEEPSEEK_V3, "qk_rope_head_dim": None}, "c")


def test_without_a_cache_it_does_not_matter_how_far_attention_sees():
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 4096}
    assert shape_from_config(mistral, "c", has_cache=False) == KNOWN_SHAPES["llama-3-8b"]
    with pytest.raises(ConfigError, match=r"jamba.*not all of its layers"):
        shape_from_config({**LLAMA, "model_type": "jamba", "mamba_d_state": 16}, "c", has_cache=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "mistral is not supported.*sliding window.*4096"),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "qwen2.*sliding window"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "not all of its layers hold experts.*step=2"),
        ({"model_type": "phi4", "v_head_dim": 64}, "phi4.*unequal sizes"),
        ({"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]}, "1 of its 2 layers are"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "gemma2.*caps"),
        ({"model_type": "jamba", "mamba_d_state": 16}, "jamba.*not all of its layers"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "llama4_text.*chunks"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5.*encoder-decoder"),
    ],
)
def test_models_that_the_cache_does_not_compute_are_refused_by_name(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        shape_from_config({**LLAMA, **changes}, "config.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"text_config": 3}, "text_config is 3"),
    ],
)
def test_impossible_sizes_are_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        shape_from_config({**LLAMA, **changes}, "config.json")
