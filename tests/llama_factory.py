"""A tiny LLaMA of transformers with random weights, for everything that starts from a dense model."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is missing; pip install 'moe-bitnet[hf]'")


def tiny_llama(seed=0, **changes):
    settings = {
        "vocab_size": 33,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # transformers starts them at 1
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
