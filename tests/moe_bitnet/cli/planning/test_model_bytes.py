import pytest

from kvcache.memory import bytes_for_tokens
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.memory_plan import cache_config
from moe_bitnet.cli.planning.model_bytes import WEIGHT_FORMATS, expert_bytes, kv_bytes, shared_bytes, shared_precision
from moe_bitnet.cli.planning.model_source import ModelSource
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.errors import ConfigError

# all experts of the model in GB
PUBLISHED_GB = {
    "mixtral-8x7b": (90.2, 11.3, 9.0),
    "qwen3-30b-a3b": (58.0, 7.3, 5.8),
    "olmoe-1b-7b": (12.9, 1.6, 1.3),
    "deepseek-v3": (1307.8, 163.5, 130.8),
}


def source(name):
    return ModelSource(name, KNOWN_SHAPES[name])


@pytest.mark.parametrize("name", PUBLISHED_GB)
def test_experts_weigh_what_their_matrices_say(name):
    shape = KNOWN_SHAPES[name]
    for weights, gigabytes in zip(WEIGHT_FORMATS, PUBLISHED_GB[name], strict=True):
        size = expert_bytes(source(name), weights) * shape.num_experts * shape.num_expert_layers
        assert size / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_experts_and_shared_weights_are_the_whole_model(name):
    shape = KNOWN_SHAPES[name]
    experts = expert_bytes(source(name), "fp16") * shape.num_experts * shape.num_expert_layers
    assert experts + shared_bytes(source(name), "fp16", None) == shape.weight_bytes("16")
    for bits in ("8", "2bit", "base3"):  # of a ternary model; the FP16 model stays as it is
        assert shared_bytes(source(name), "fp16", bits) == shared_bytes(source(name), "2bit", "16")
        assert shared_bytes(source(name), "2bit", bits) < shared_bytes(source(name), "2bit", None)


def test_a_model_of_this_project_is_weighed_by_its_tensors():
    config = PRESETS["tiny"].model_config(320, "float")
    own = ModelSource("tiny", KNOWN_SHAPES["mixtral-8x7b"], config=config)
    for weights, layout in (("fp16", None), ("2bit", "2bit"), ("base3", "base3")):
        sizes = model_sizes(config.replace(precision="float" if layout is None else "ternary"), layout)
        assert expert_bytes(own, weights) == sizes.expert_bytes
        assert shared_bytes(own, weights, None) == sizes.home_bytes
    assert shared_precision(own, None) == "as packed"
    assert shared_precision(own, "2bit") == "ternary 2bit, tables 16 bits"
    assert shared_precision(source("mixtral-8x7b"), None) == shared_precision(own, "16") == "16 bits"


def test_a_cache_weighs_what_the_allocator_takes():
    shape = KNOWN_SHAPES["mixtral-8x7b"]
    assert kv_bytes(shape, 32_768, "K4V4") == bytes_for_tokens(cache_config(shape, "K4V4"), 32_768)
    assert kv_bytes(shape, 0, "K4V4") == 0
    latent = KNOWN_SHAPES["deepseek-v3"]
    assert kv_bytes(latent, 1000, "FP16") == 1000 * 61 * 576 * 2
    with pytest.raises(ConfigError, match=r"MLA.*Use FP16"):
        kv_bytes(latent, 1000, "K4V4")
    with pytest.raises(ConfigError, match=r"'K3' *; allowed are FP16, K8V8"):
        kv_bytes(shape, 1, "K3")
