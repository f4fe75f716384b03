import pytest
import torch
from factories import random_token_ids, tiny_config, tiny_model

from moe_bitnet.bitlinear import BitLinear, PackedBitLinear
from moe_bitnet.checkpoint.pack import model_layout, pack_model, packed_skeleton
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.experts import BitExperts, PackedExperts
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import LAYOUTS

SHAPES = [
    {},
    {"norm_recipe": "inner_norm", "num_shared_experts": 1, "intermediate_size": 33},
    {"activation": "squared_relu"},
    {"activation": "squared_relu", "norm_recipe": "inner_norm", "num_shared_experts": 3},
    {"activation": "squared_relu", "num_experts": 1, "top_k": 1, "has_tied_embeddings": False},
    {"precision": "binary", "num_shared_experts": 1, "shared_intermediate_size": 12},
    {"has_float_backbone": True, "num_shared_experts": 1, "shared_intermediate_size": 12},
]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_packed_logits_equal_latent_logits(changes, layout):
    # Bit for bit: integers are exact, each is rescaled once; the norm's factor and the sigmoid are rounded once, too,
    # and everything else is the same float32 code.
    model, token_ids = tiny_model(**changes), random_token_ids(2, 7)
    packed = pack_model(model, layout)
    assert torch.equal(packed(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("changes", SHAPES)
def test_training_logits_equal_packed_logits_to_rounding(changes, layout):
    # with gradients the float steps are float32 throughout
    model, token_ids = tiny_model(**changes), random_token_ids(2, 7)
    latent, packed = model(token_ids).logits.detach(), pack_model(model, layout)(token_ids).logits.detach()
    # An ulp may tip one int8 value over a tie: one step of 127 in one of the inputs of a matrix, at most in each
    # of the four matrices on the way (two layers). More would be another computation.
    assert (packed - latent).norm() <= 4 / 127 * latent.norm()
    assert torch.equal(packed.argmax(-1), latent.argmax(-1))


def test_every_ternary_layer_is_packed_and_nothing_else_changes(layout):
    model = tiny_model(num_shared_experts=1, norm_recipe="inner_norm")
    packed = pack_model(model, layout)
    assert not any(isinstance(module, (BitLinear, BitExperts)) for module in packed.modules())
    assert sum(isinstance(module, PackedBitLinear) for module in packed.modules()) == 2 * 4
    assert sum(isinstance(module, PackedExperts) for module in packed.modules()) == 2 * 2
    state, packed_state = model.state_dict(), packed.state_dict()
    kept = {name for name in packed_state if not name.endswith(("_packed", "_scale"))}
    assert kept == {name for name in state if "_proj.weight" not in name and "experts.gate" not in name
                    and "experts.up" not in name and "experts.down" not in name}  # fmt: skip
    assert all(torch.equal(packed_state[name], state[name]) for name in kept)
    assert packed.config == model.config


def test_the_trained_model_stays_as_it_is(layout):
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack_model(model, layout)
    assert model.training
    assert not packed.training
    assert model_layout(model) is None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "nothing is shared"


def test_the_layout_of_a_model_is_known(layout):
    assert model_layout(tiny_model()) is None
    assert model_layout(tiny_model(precision="float")) is None
    assert model_layout(pack_model(tiny_model(), layout)) == layout


def test_a_float_twin_is_refused(layout):
    with pytest.raises(CheckpointError, match="precision is 'float'; only 'ternary'"):
        pack_model(tiny_model(precision="float"), layout)


def test_a_packed_model_is_refused(layout):
    packed = pack_model(tiny_model(), layout)
    for again in LAYOUTS:
        with pytest.raises(CheckpointError, match=rf"packed already \(layout {layout}\)"):
            pack_model(packed, again)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ConfigError, match=r"'3bit'.*2bit, base3"):
        pack_model(tiny_model(), "3bit")


@pytest.mark.parametrize("changes", SHAPES)
def test_a_skeleton_has_the_names_and_shapes_of_a_packed_model_without_memory(changes, layout):
    config = tiny_config(**changes)
    with torch.device("meta"):
        skeleton = MoETransformer(config)
    packed_skeleton(skeleton, layout)
    expected = pack_model(tiny_model(**changes), layout).state_dict()
    actual = skeleton.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in actual.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }
    assert all(tensor.device.type == "meta" for tensor in actual.values())
