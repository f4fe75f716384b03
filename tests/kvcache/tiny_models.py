"""Random models of transformers, a few thousand weights each, made from configs: nothing is downloaded."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 97
PAD_TOKEN = 0

# What a model type needs beside the common sizes.
_SPECIAL = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "starcoder2": {"sliding_window": None},
}
# These divide the hidden size.
_DERIVED_HEAD_DIM = {
    "cohere", "gpt_neox", "granite", "granitemoe", "olmo", "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe",
    "starcoder2",
}  # fmt: skip


def tiny_model(model_type: str = "llama", **sizes: Any) -> Any:
    """Return a model in eval mode, the same for the same arguments."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,  # wide enough that greedy tokens do not hang on the last bits
        "pad_token_id": PAD_TOKEN,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **_SPECIAL.get(model_type, {}),
        **sizes,
    }
    if model_type in _DERIVED_HEAD_DIM:
        settings.pop("head_dim")
    if model_type == "gpt_neox":  # has no groups
        settings.pop("num_key_value_heads")
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return int64 token ids, none of them padding."""
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids ``[len(lengths), max(lengths)]``, padded on the left, and their attention mask."""
    token_ids = random_tokens(len(lengths), max(lengths))
    mask = torch.ones_like(token_ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return token_ids.masked_fill(mask == 0, PAD_TOKEN), mask
