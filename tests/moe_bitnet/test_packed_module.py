"""A packed module holds portable bytes or tiles, never both, and shows the portable ones to the outside."""

import copy

import pytest
import torch
from factories import randomize, tiny_config
from torch import nn

from moe_bitnet.bitlinear import BitLinear, PackedBitLinear
from moe_bitnet.errors import CheckpointError
from moe_bitnet.experts import PROJECTIONS, BitExperts, PackedExperts
from moe_bitnet.packed_module import PackedModule, arrange_weights
from moe_bitnet.packing import LAYOUTS, PackedTernary
from moe_bitnet.router import Routing
from moe_bitnet.tiles import TiledTernary


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def packed_linear(layout, seed=0):
    return PackedBitLinear.from_bitlinear(randomize(BitLinear(33, 7, 1e-5), seed), layout)


def packed_experts(layout, seed=0):
    config = tiny_config()
    return PackedExperts.from_experts(randomize(BitExperts(config, 5), seed), config, layout)


@pytest.fixture(params=[packed_linear, packed_experts], ids=["linear", "experts"])
def make_module(request):
    return request.param


@torch.no_grad()
def output_of(module):
    generator = torch.Generator().manual_seed(7)
    if isinstance(module, PackedBitLinear):
        return module(torch.randn(9, 33, generator=generator))
    choices = torch.rand(9, 5, generator=generator).argsort(dim=1)[:, :2]
    return module.run(torch.randn(9, 12, generator=generator), Routing(choices, torch.ones(9, 2), torch.zeros(9, 5)))


def names_of(module):
    return ("weight",) if isinstance(module, PackedBitLinear) else PROJECTIONS


def buffer_bytes(module):
    return sum(buffer.numel() for name, buffer in module.named_buffers() if not name.endswith("_scale"))


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


def test_the_state_of_an_arranged_module_is_portable_and_the_one_before(make_module, layout):
    module = make_module(layout)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.arrange_weights()
    assert_same_state(module.state_dict(), before)


def test_arranging_changes_no_output(make_module, layout):
    module = make_module(layout)
    before = output_of(module)
    module.arrange_weights()
    assert torch.equal(output_of(module), before)
    module.arrange_weights()
    assert torch.equal(output_of(module), before), "twice is once"


def test_weights_are_held_once(make_module, layout):
    module = make_module(layout)
    for name in names_of(module):
        assert module._buffers[f"{name}_tiles"] is None
        assert isinstance(module.matrix(name), PackedTernary)
    module.arrange_weights()
    for name in names_of(module):
        assert module._buffers[f"{name}_packed"] is None
        assert isinstance(module.matrix(name), TiledTernary)
        assert isinstance(module.portable(name), PackedTernary)
    assert buffer_bytes(module) == sum(module.matrix(name).tiles.numel() for name in names_of(module))


@pytest.mark.parametrize("is_source_arranged", [False, True])
@pytest.mark.parametrize("is_target_arranged", [False, True])
def test_a_state_is_loaded_whether_or_not_the_weights_are_arranged(
    make_module, layout, is_source_arranged, is_target_arranged
):
    source, target = make_module(layout, seed=1), make_module(layout, seed=2)
    expected = output_of(source)
    assert not torch.equal(output_of(target), expected)
    if is_source_arranged:
        source.arrange_weights()
    if is_target_arranged:
        target.arrange_weights()
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert torch.equal(output_of(target), expected)
    assert_same_state(target.state_dict(), source.state_dict())
    target.arrange_weights()
    assert torch.equal(output_of(target), expected)


@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_missing_weight_is_reported(make_module, layout, prefix):
    module = make_module(layout)
    module.arrange_weights()
    parent = nn.ModuleList([module]) if prefix else module
    name = f"{prefix}{names_of(module)[0]}_packed"
    state = {key: tensor for key, tensor in parent.state_dict().items() if key != name}
    assert parent.load_state_dict(state, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match="Missing key"):
        parent.load_state_dict(state)


def test_a_loaded_state_is_a_copy(make_module, layout):
    source, target = make_module(layout, seed=1), make_module(layout, seed=2)
    target.load_state_dict(source.state_dict())
    before = output_of(target)
    for tensor in source.state_dict().values():
        tensor.zero_()
    assert torch.equal(output_of(target), before)


@pytest.mark.parametrize("is_arranged", [False, True])
def test_a_deep_copy_is_equal_and_shares_nothing(make_module, layout, is_arranged):
    module = make_module(layout)
    if is_arranged:
        module.arrange_weights()
    expected, twin = output_of(module), copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (*module.buffers(), *module.parameters()):
            tensor.zero_()
    assert torch.equal(output_of(twin), expected)
    for name in names_of(twin):
        assert isinstance(twin.matrix(name), TiledTernary if is_arranged else PackedTernary)


@pytest.mark.parametrize("is_arranged", [False, True])
def test_a_module_moves_between_devices(make_module, layout, is_arranged):
    module = make_module(layout)
    if is_arranged:
        module.arrange_weights()
    expected = output_of(module)
    assert torch.equal(output_of(module.to("cpu")), expected)
    module.to("meta")
    assert {tensor.device.type for tensor in (*module.buffers(), *module.parameters())} == {"meta"}
    for name in names_of(module):
        assert module.matrix(name).weight_scale.is_meta


def test_weights_on_the_meta_device_are_left_alone(layout):
    with torch.device("meta"):
        module = PackedExperts(tiny_config(), 5, layout)
    module.arrange_weights()
    for name in PROJECTIONS:
        assert isinstance(module.matrix(name), PackedTernary)


def test_half_precision_leaves_integers_and_bytes_alone(make_module, layout):
    # module.to(dtype) converts floats alone: bytes must stay bytes
    module = make_module(layout)
    module.arrange_weights()
    module.bfloat16()
    for name in names_of(module):
        assert module.matrix(name).tiles.dtype == torch.uint8


def test_damaged_bytes_are_refused_when_they_are_arranged(layout):
    module = packed_linear(layout)
    module.get_buffer("weight_packed")[3, 2] = 255
    with pytest.raises(CheckpointError, match="1 bytes"):
        module.arrange_weights()


def test_a_model_is_arranged_module_by_module(layout):
    model = nn.Sequential(packed_linear(layout), nn.Linear(7, 3), nn.ModuleList([packed_experts(layout)]))
    arrange_weights(model)
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    assert len(modules) == 2
    for module in modules:
        assert all(isinstance(module.matrix(name), TiledTernary) for name in names_of(module))


def test_new_bytes_replace_tiles(layout):
    module, other = packed_linear(layout, seed=1), packed_linear(layout, seed=2)
    module.arrange_weights()
    weight = other.portable("weight")
    module.set_matrix("weight", weight.weight_packed, weight.weight_scale)
    module.norm.load_state_dict(other.norm.state_dict())
    assert torch.equal(output_of(module), output_of(other))
