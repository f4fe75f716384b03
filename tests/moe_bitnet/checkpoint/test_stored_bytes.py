from typing import get_args

import pytest

from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.checkpoint.stored_bytes import stored_bytes, stored_forms
from moe_bitnet.config import ModelConfig, Precision


@pytest.fixture
def config():
    return ModelConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1,
        num_experts=4, top_k=2, num_shared_experts=1,
    )  # fmt: skip


def test_a_float_model_takes_two_bytes_a_parameter(config):
    sizes = model_sizes(config.replace(precision="float"), float_bytes=2)
    assert stored_bytes(config.replace(precision="float")) < sizes.total_bytes  # norms and routers have 4 bytes there
    num_matrix = 2 * (4 + 1) * 3 * 64 * 128 + 2 * (2 * (2 + 1) * 32 * 64) + 100 * 64
    assert stored_bytes(config.replace(precision="float")) == pytest.approx(2 * num_matrix, rel=0.01)


def test_fewer_bits_take_fewer_bytes(config):
    sizes = {
        name: size
        for precision in get_args(Precision)
        for name, size in stored_forms(config.replace(precision=precision)).items()
    }
    assert sorted(sizes, key=sizes.__getitem__) == ["binary", "ternary base3", "ternary 2bit", "int4 experts", "FP16"]


def test_four_bit_weights_are_counted_in_routed_experts_alone(config):
    num_weights = 2 * 4 * 3 * 64 * 128
    saved = stored_bytes(config.replace(precision="float")) - stored_bytes(config.replace(precision="int4-experts"))
    assert saved == pytest.approx(num_weights * (16 - 4.5) / 8)


def test_a_float_backbone_stays_float(config):
    binary = config.replace(precision="binary", has_float_backbone=True)
    saved = stored_bytes(binary.replace(precision="float")) - stored_bytes(binary)
    assert saved == pytest.approx(2 * 4 * 3 * 64 * 128 * 15 / 8)
