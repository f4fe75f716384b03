import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_bitnet.errors import CheckpointError, ConfigError, ShapeError
from moe_bitnet.packing import LAYOUTS, PackedTernary, check_layout, check_packed, pack, packed_width, unpack


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


def random_ternary(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def test_layouts_are_the_two_of_the_format():
    assert LAYOUTS == ("2bit", "base3")


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(1, 35), min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(layout, shape, seed):
    ternary = random_ternary(*shape, seed=seed)
    packed = pack(ternary, layout)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], layout))
    assert torch.equal(unpack(packed, shape[-1], layout), ternary)
    check_packed(packed, shape[-1], layout, "weight")


@settings(deadline=None, max_examples=60)
@given(in_features=st.integers(1, 40), data=st.data())
def test_pack_inverts_unpack_on_valid_bytes(layout, in_features, data):
    width = packed_width(in_features, layout)
    valid = [b for b in range(256) if is_valid(b, layout)]
    packed = torch.tensor(data.draw(st.lists(st.sampled_from(valid), min_size=width, max_size=width)))
    packed = packed.to(torch.uint8)
    full = unpack(packed, width * {"2bit": 4, "base3": 5}[layout], layout)
    assert torch.equal(pack(full, layout), packed)


def is_valid(byte, layout):
    return byte <= 242 if layout == "base3" else all((byte >> shift) & 3 != 3 for shift in (0, 2, 4, 6))


def test_bytes_of_2bit_are_as_drawn():
    # codes 2, 0, 1, 2 from the lowest bits up: 10'01'00'10
    assert pack(torch.tensor([[1, -1, 0, 1]], dtype=torch.int8), "2bit").tolist() == [[0b10_01_00_10]]
    # the rest of a row is weight 0, code 1
    assert pack(torch.tensor([-1], dtype=torch.int8), "2bit").tolist() == [0b01_01_01_00]
    assert pack(torch.tensor([0, 0, 0, 0, 1], dtype=torch.int8), "2bit").tolist() == [0b01_01_01_01, 0b01_01_01_10]


def test_bytes_of_base3_are_as_drawn():
    # codes 2, 0, 1, 2, 1: 2 + 0·3 + 1·9 + 2·27 + 1·81
    assert pack(torch.tensor([[1, -1, 0, 1, 0]], dtype=torch.int8), "base3").tolist() == [[146]]
    assert pack(torch.tensor([-1] * 5, dtype=torch.int8), "base3").tolist() == [0]
    assert pack(torch.tensor([1] * 5, dtype=torch.int8), "base3").tolist() == [242]
    # the rest of a row is weight 0, code 1: 0 + 3 + 9 + 27 + 81
    assert pack(torch.tensor([0] * 5 + [-1], dtype=torch.int8), "base3").tolist() == [121, 120]


def test_every_base3_byte_is_one_combination():
    combinations = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8)
    assert sorted(pack(combinations, "base3").flatten().tolist()) == list(range(243))


@pytest.mark.parametrize(("layout", "bits"), [("2bit", 2.0), ("base3", 1.6)])
def test_bits_a_weight(layout, bits):
    packed = PackedTernary(pack(random_ternary(7, 20), layout), torch.ones(1, 1), 20, layout)
    assert 8 * packed.weight_packed.numel() / (7 * 20) == bits
    assert packed.num_bytes == 7 * 20 * bits / 8 + 4
    assert packed.out_features == 7


@pytest.mark.parametrize("value", [2, -2, 127, -127, -128])
def test_pack_refuses_other_values(layout, value):
    weight = random_ternary(3, 7)
    weight[1, 3] = value
    with pytest.raises(ShapeError, match="-1, 0 or 1"):
        pack(weight, layout)


def test_check_refuses_exactly_the_invalid_bytes(layout):
    for byte in range(256):
        packed = torch.tensor([[0, byte]], dtype=torch.uint8)
        in_features = 2 * {"2bit": 4, "base3": 5}[layout]
        if is_valid(byte, layout):
            check_packed(packed, in_features, layout, "name")
        else:
            with pytest.raises(CheckpointError, match=r"the\.name.*no ternary"):
                check_packed(packed, in_features, layout, "the.name")


def test_check_refuses_wrong_width_and_dtype(layout):
    packed = pack(random_ternary(3, 33), layout)
    for wrong in (packed[:, :-1], packed.to(torch.int16), packed.view(torch.int8)):
        with pytest.raises(CheckpointError, match=r"the\.name"):
            check_packed(wrong, 33, layout, "the.name")


def test_unknown_layout_is_refused():
    assert [check_layout(name) for name in LAYOUTS] == list(LAYOUTS)
    with pytest.raises(ConfigError, match=r"'3bit'.*2bit, base3"):
        check_layout("3bit")


def test_select_takes_whole_matrices(layout):
    ternary, scale = random_ternary(5, 3, 7), torch.rand(5, 1, 1)
    index = torch.tensor([4, 0, 4])
    chosen = PackedTernary(pack(ternary, layout), scale, 7, layout).select(index)
    np.testing.assert_array_equal(chosen.unpack().numpy(), ternary[index].numpy())
    assert torch.equal(chosen.weight_scale, scale[index])


def test_unpacking_stays_on_the_device_of_its_input(layout):
    # A fake CUDA tensor has a device and no data, so this runs on every machine.
    with FakeTensorMode():
        packed = torch.zeros(3, packed_width(7, layout), dtype=torch.uint8, device="cuda")
        assert unpack(packed, 7, layout).device.type == "cuda"
