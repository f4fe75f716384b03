import pytest
import safetensors.torch
import torch
from factories import tiny_model

from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.checkpoint.sizes import folder_bytes, model_sizes
from moe_bitnet.config import ModelConfig

SHAPES = [
    {},
    {"hidden_size": 33, "intermediate_size": 1},
    {"num_experts": 7, "num_layers": 1, "top_k": 3},
    {"num_experts": 1, "top_k": 1},
    {"num_shared_experts": 1},
    {"num_shared_experts": 2, "has_tied_embeddings": False},
    {"norm_recipe": "inner_norm"},
    {"num_shared_experts": 2, "shared_intermediate_size": 9},
    {"num_shared_experts": 1, "shared_intermediate_size": 9, "has_float_backbone": True},
]


def saved_tensors(model, folder, **settings):
    save_model(model, folder, **settings)
    return safetensors.torch.load_file(folder / "model.safetensors")


def check(sizes, model, tensors):
    expert_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if ".moe.experts." in name)
    home_bytes = sum(tensor.nbytes for tensor in tensors.values()) - expert_bytes
    assert sizes.num_experts == model.config.num_layers * model.config.num_experts
    assert sizes.expert_bytes * sizes.num_experts == expert_bytes
    assert sizes.home_bytes == home_bytes
    assert sizes.total_bytes == expert_bytes + home_bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["2bit", "base3"])
def test_packed_models_weigh_what_is_saved(layout, shape, tmp_path):
    model = pack_model(tiny_model(**shape), layout)
    check(model_sizes(model.config, layout), model, saved_tensors(model, tmp_path / "model"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["float", "ternary"])
def test_half_precision_models_weigh_what_is_saved(precision, shape, tmp_path):
    model = tiny_model(precision=precision, **shape)
    check(model_sizes(model.config), model, saved_tensors(model, tmp_path / "model", float_dtype=torch.float16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["float", "ternary"])
def test_float32_models_weigh_what_they_hold(precision, shape):
    model = tiny_model(precision=precision, **shape)
    check(model_sizes(model.config, float_bytes=4), model, model.state_dict())


def test_nothing_is_allocated():
    """A model of 1.3 TB in half precision."""
    config = ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=2048,
        num_layers=58,
        num_heads=128,
        num_kv_heads=128,
        num_experts=256,
        top_k=8,
        num_shared_experts=1,
    )
    float_sizes, packed_sizes = model_sizes(config), model_sizes(config, "base3")
    assert float_sizes.num_experts == 58 * 256
    # 16 bits against 1.6, and as many bytes more for the norm and the scales of both
    assert 9.98 < float_sizes.expert_bytes / packed_sizes.expert_bytes < 10


def test_a_folder_weighs_its_files(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "nested").mkdir()
    assert folder_bytes(tmp_path) == 5
