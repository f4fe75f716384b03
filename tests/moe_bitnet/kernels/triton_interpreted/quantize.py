"""Quantizers in Triton's interpreter; run by ``test_triton.py`` in a process of its own."""

import numerics
import pytest
import torch

from moe_bitnet.errors import ShapeError
from moe_bitnet.inference_math import rms_norm
from moe_bitnet.kernels.triton.operations import normalize_inner, quantize_activation, rms_norm_quantize
from moe_bitnet.quantization import quantize_activation as reference

EPS = 1e-5
SHAPES = [(1, 1), (7, 33), (3, 65), (2, 130), (2, 4099), (2, 3, 7)]


def assert_equals_the_reference(x):
    x_q, scale = quantize_activation(x)
    expected_q, expected_scale = reference(x)
    assert torch.equal(x_q, expected_q)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exponent", [-44, -5, 0, 30])
def test_quantize_equals_the_reference_bit_for_bit(shape, exponent):
    assert_equals_the_reference(torch.randn(shape) * 10.0**exponent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    assert_equals_the_reference((torch.randn(7, 33) * 3).to(dtype))
    gain = torch.ones(33)
    x = (torch.randn(7, 33) * 3).to(dtype)
    for mine, same in zip(rms_norm_quantize(x, gain, EPS), rms_norm_quantize(x.float(), gain, EPS), strict=True):
        assert torch.equal(mine, same)


@pytest.mark.parametrize("power", [0, -10, 20])
def test_ties_go_to_the_even_integer(power):
    assert_equals_the_reference(torch.cat((torch.tensor([-127.0]), torch.arange(-126.5, 127, 0.5)))[None] * 2.0**power)


def test_extreme_rows():
    largest = torch.finfo(torch.float32).max
    assert_equals_the_reference(torch.tensor([[0.0, -0.0, 0.0], [1e-45, -1e-40, 1e-38], [largest, -largest, 1.0]]))
    assert_equals_the_reference(torch.tensor([[1e-5, -9e-6, 4e-8], [3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operation", ["quantize", "norm"])
def test_a_row_that_is_not_finite_shows_it_in_its_scale_and_spares_the_others(operation, value):
    def run(x):
        return quantize_activation(x) if operation == "quantize" else rms_norm_quantize(x, torch.ones(33), EPS)

    x = torch.randn(3, 33)
    expected_q, expected_scale = run(x)
    for position in (0, 17, 32):
        bad = x.clone()
        bad[1, position] = value
        x_q, scale = run(bad)
        assert not scale[1].isfinite()
        assert not x_q[1].any()
        assert torch.equal(x_q[[0, 2]], expected_q[[0, 2]])
        assert torch.equal(scale[[0, 2]], expected_scale[[0, 2]])


def assert_rounds_the_norm(x_q, scale, x, gain, eps):
    """Scales as exact as plain float32 makes them; integers next to the float64 quotient.

    Norm factor and scale carry the same error, which their quotient loses; a product with the factor, one with
    the gain, the maximum's own two and a division remain: five roundings of half an ulp, and one for the conversion.
    """
    truth = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()
    plain = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def scale_of(normed):
        return normed.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127

    numerics.assert_close_to_truth(scale, scale_of(plain), scale_of(truth))
    distance = (x_q.double() - truth / scale_of(truth)).abs()
    assert float(distance.max()) <= 0.5 + 127 * 6 * numerics.EPS / 2


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("exponent", [-8, 0, 8])
def test_norm_is_as_exact_as_plain_float32(shape, exponent):
    x, gain = torch.randn(shape) * 10.0**exponent, torch.randn(shape[-1])
    x_q, scale = rms_norm_quantize(x, gain, EPS)
    assert_rounds_the_norm(x_q, scale, x, gain, EPS)
    reference_q, _ = reference(rms_norm(x, EPS) * gain)
    assert int((x_q.int() - reference_q.int()).abs().max()) <= 1


def test_squares_beyond_float32_show_in_the_scale():
    x_q, scale = rms_norm_quantize(torch.tensor([[1e30, -2e30], [1.0, 2.0]]), torch.ones(2), EPS)
    assert bool(scale[0].isnan())
    assert not x_q[0].any()
    assert bool(scale[1].isfinite())


def test_each_row_takes_the_gain_of_its_expert():
    inner, gain = torch.randn(9, 33), torch.randn(4, 33)
    x_q, scale, sums = normalize_inner(inner, gain, EPS, torch.tensor([0, 2, 2, 8, 9]))
    expert_of_row = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 3])
    assert_rounds_the_norm(x_q, scale, inner, gain[expert_of_row], EPS)
    assert torch.equal(sums, x_q.int().sum(-1, dtype=torch.int32))


def test_strides_do_not_matter_and_the_input_is_not_changed():
    x = torch.randn(33, 14)
    before = x.clone()
    for view in (x.T, x[:, ::2], x[1:, 3:]):
        assert_equals_the_reference(view)
    assert torch.equal(x, before)


def test_no_rows_give_no_rows_and_rows_without_features_are_refused():
    x_q, scale = quantize_activation(torch.empty(2, 0, 7))
    assert x_q.shape == (2, 0, 7)
    assert scale.shape == (2, 0, 1)
    with pytest.raises(ShapeError, match="at least one feature"):
        quantize_activation(torch.empty(7, 0))
    with pytest.raises(ShapeError, match="33 features"):
        rms_norm_quantize(torch.ones(3, 33), torch.ones(32), EPS)
