"""Tiny models and a plain cache for tests; sizes are odd where the model allows it."""

import torch

from moe_bitnet.config import ModelConfig
from moe_bitnet.kernels import registry
from moe_bitnet.model import MoETransformer


def tiny_config(**changes):
    sizes = {
        "vocab_size": 33,
        "hidden_size": 12,
        "intermediate_size": 7,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "num_experts": 5,
        "top_k": 2,
        "head_dim": 4,
    }
    return ModelConfig(**{**sizes, **changes})


def randomize(module, seed=0):
    """Draw every parameter anew, norms around 1 and matrices of unit gain: no weight keeps a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 or name.endswith("norm_weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * parameter.shape[-1] ** -0.5)
    return module


def tiny_model(seed=0, **changes):
    return randomize(MoETransformer(tiny_config(**changes)), seed).eval()


def random_token_ids(*shape, vocab_size=33, seed=1):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def backends_with(operation):
    """Names of the available kernel backends that have ``operation`` for CPU tensors."""
    backends = registry().backends
    return [b.name for b in backends if operation in b.operations and "cpu" in b.device_types]


class ListCache:
    """The plainest AttentionCache: every key and value in float32."""

    def __init__(self, num_layers):
        self.keys = [[] for _ in range(num_layers)]
        self.values = [[] for _ in range(num_layers)]

    @property
    def length(self):
        return min(sum(len(part) for part in layer) for layer in self.values)

    def extend(self, layer_index, query, key, value):
        self.keys[layer_index].append(key.clone())
        self.values[layer_index].append(value.clone())
        key, value = torch.cat(self.keys[layer_index]), torch.cat(self.values[layer_index])
        group_size = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
        scores = torch.einsum("qnd,knd->nqk", query, key) * query.shape[-1] ** -0.5
        query_positions = torch.arange(len(key) - len(query), len(key))
        scores.masked_fill_(torch.arange(len(key)) > query_positions[:, None], float("-inf"))
        return torch.einsum("nqk,knd->qnd", scores.softmax(dim=-1), value)


class HalfCache(ListCache):
    """Every key and value rounded to float16, as the fused decoder holds them; attention in ``dtype``."""

    def __init__(self, num_layers, dtype=torch.float32):
        super().__init__(num_layers)
        self.dtype = dtype

    def extend(self, layer_index, query, key, value):
        query, key, value = query.to(self.dtype), key.half().to(self.dtype), value.half().to(self.dtype)
        return super().extend(layer_index, query, key, value).float()
