import pytest
import torch
from numerics import assert_matches_definition, rms, straight_through_linear, with_gradients

from moe_bitnet.bitlinear import BitLinear, FloatLinear, PackedBitLinear
from moe_bitnet.packing import LAYOUTS
from moe_bitnet.quantization import quantize_activation, quantize_weight

SIZES = [(1, 1), (7, 33), (33, 7), (64, 20)]
EPS = 1e-5


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def make_linear(in_features, out_features, has_norm, kind=BitLinear):
    linear = kind(in_features, out_features, EPS if has_norm else None)
    if has_norm:
        linear.norm.weight.data.normal_(1, 0.3)
    return linear


def definition(x, weight, gain=None):
    return straight_through_linear(x if gain is None else rms(x, EPS) * gain, weight)


# A norm of one feature leaves no gradient but cancelled roundings, so it is not compared.
@pytest.mark.parametrize(
    ("in_features", "out_features", "has_norm"),
    [(*size, has_norm) for size in SIZES for has_norm in (False, True) if size[0] > 1 or not has_norm],
)
def test_output_and_gradients_equal_the_straight_through_definition(in_features, out_features, has_norm):
    linear = make_linear(in_features, out_features, has_norm)
    x, upstream = torch.randn(2, 7, in_features, requires_grad=True), torch.randn(2, 7, out_features)
    output = linear(x)
    assert output.dtype == torch.float32
    output.backward(upstream)
    inputs = [x, linear.weight, *([linear.norm.weight] if has_norm else [])]
    actual = [output, *(leaf.grad for leaf in inputs)]
    assert_matches_definition(actual, with_gradients(definition, upstream), inputs)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
@torch.no_grad()
def test_packed_layer_equals_the_latent_one_bit_for_bit(in_features, out_features, has_norm, layout):
    # Both sum the same integers exactly (below 2^24) and rescale once by the same product; without gradients the norm's
    # factor is rounded once in both. Not even an ulp may differ.
    linear = make_linear(in_features, out_features, has_norm)
    packed = PackedBitLinear.from_bitlinear(linear, layout)
    x = torch.randn(3, 7, in_features)
    assert torch.equal(packed(x), linear(x))


def test_packed_layer_holds_the_quantized_weight(layout):
    linear = make_linear(33, 7, False)
    ternary, scale = quantize_weight(linear.weight)
    packed = PackedBitLinear.from_bitlinear(linear, layout)
    for weight in (packed.matrix("weight"), packed.portable("weight")):
        assert torch.equal(weight.unpack(), ternary)
        assert torch.equal(weight.weight_scale, scale)


def test_packed_layer_shares_nothing_with_the_trained_one(layout):
    linear = make_linear(33, 7, True)
    packed, x = PackedBitLinear.from_bitlinear(linear, layout), torch.randn(3, 33)
    before = packed(x)
    with torch.no_grad():
        linear.weight.zero_()
        linear.norm.weight.zero_()
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
@torch.no_grad()
def test_any_leading_sizes_are_taken(shape, layout):
    linear = make_linear(7, 5, True)
    packed, x = PackedBitLinear.from_bitlinear(linear, layout), torch.randn(shape)
    assert linear(x).shape == (*shape[:-1], 5)
    assert torch.equal(packed(x), linear(x))


def test_a_row_of_zeros_gives_zeros(layout):
    linear = make_linear(33, 7, True)
    for layer in (linear, PackedBitLinear.from_bitlinear(linear, layout)):
        assert not layer(torch.zeros(1, 33)).any()


def test_bfloat16_rounds_only_the_sums():
    linear, x = make_linear(33, 7, False), torch.randn(7, 33)
    expected = linear(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear(x)
    assert actual.dtype == torch.float32
    x_q, activation_scale = quantize_activation(x)
    ternary, weight_scale = quantize_weight(linear.weight)
    sums = (x_q.float() @ ternary.float().T).bfloat16().float()
    assert torch.equal(actual, sums * (activation_scale * weight_scale))
    assert not torch.equal(actual, expected), "the sums exceed 8 bits here, so that the test sees the rounding"


@pytest.mark.parametrize("has_norm", [False, True])
def test_float_linear_is_a_norm_and_a_matrix(has_norm):
    linear, x = make_linear(33, 7, has_norm, FloatLinear), torch.randn(3, 33)

    def plain(x, weight, gain=None):
        return [(x if gain is None else rms(x, EPS) * gain) @ weight.T]

    inputs = [x, linear.weight, *([linear.norm.weight] if has_norm else [])]
    assert_matches_definition([linear(x)], plain, inputs)


def test_float_linear_takes_weights_stored_in_half_precision():
    linear, x = make_linear(33, 7, True, FloatLinear), torch.randn(3, 33)
    linear.weight.data = linear.weight.data.half()
    wide = make_linear(33, 7, True, FloatLinear)
    wide.load_state_dict({name: tensor.float() for name, tensor in linear.state_dict().items()})
    assert linear(x).dtype == torch.float32
    assert torch.equal(linear(x), wide(x))


@pytest.mark.parametrize("kind", [BitLinear, FloatLinear])
@pytest.mark.parametrize("has_norm", [False, True])
def test_half_precision_rows_are_taken(kind, has_norm):
    linear, x = make_linear(33, 7, has_norm, kind), torch.randn(3, 33).bfloat16()
    assert torch.equal(linear(x), linear(x.float()))
