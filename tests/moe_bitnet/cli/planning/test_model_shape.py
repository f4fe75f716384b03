import pytest

from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_shape import WEIGHT_BITS
from moe_bitnet.config import ModelConfig

PUBLISHED_WEIGHTS = {
    "smollm2-135m": 134.5e6,
    "olmoe-1b-7b": 6.92e9,
    "llama-3-8b": 8.03e9,
    "llama-3-70b": 70.55e9,
    "mixtral-8x7b": 46.7e9,
    "qwen3-30b-a3b": 30.53e9,
    "deepseek-v3": 671.03e9,
}


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_have_as_many_weights_as_published(name):
    assert KNOWN_SHAPES[name].num_weights == pytest.approx(PUBLISHED_WEIGHTS[name], rel=2e-3)


@pytest.mark.parametrize("name", [name for name, shape in KNOWN_SHAPES.items() if shape.latent is None])
def test_known_shapes_fit_our_own_model(name):
    shape = KNOWN_SHAPES[name]
    config = ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        has_tied_embeddings=shape.has_tied_embeddings,
        precision="float",
    )
    # our models have more norms, and routers in float32
    assert model_sizes(config).total_bytes == pytest.approx(shape.weight_bytes("16"), rel=2e-3)


def test_fewer_bits_take_fewer_bytes_and_leave_the_tables():
    shape = KNOWN_SHAPES["llama-3-8b"]
    sizes = [shape.weight_bytes(bits) for bits in WEIGHT_BITS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 2 * shape.num_weights
    assert sizes[-1] == round(0.2 * shape.num_matrix_weights) + 2 * shape.num_other_weights
