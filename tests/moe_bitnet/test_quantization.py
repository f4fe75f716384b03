import numpy as np
import pytest
import torch

from moe_bitnet.quantization import (
    INT4_GROUP_SIZE,
    MIN_SCALE,
    fake_quantize_activation,
    fake_quantize_int4,
    fake_quantize_weight,
    quantize_activation,
    quantize_weight,
    weight_absmean,
)

SHAPES = [(1, 1), (7, 33), (33, 7), (3, 7, 5), (2, 3, 1, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_follow_the_absmean_formula(shape):
    weight = torch.randn(shape)
    ternary, scale = quantize_weight(weight)
    truth = weight.double().numpy()
    expected_scale = np.maximum(np.abs(truth).mean(axis=(-2, -1), keepdims=True), 1e-5)
    expected = np.clip(np.rint(truth / expected_scale), -1, 1)
    assert ternary.dtype == torch.int8
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(ternary.numpy(), expected)
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("shape", [(1,), (33,), *SHAPES])
def test_activations_follow_the_absmax_formula(shape):
    x = torch.randn(shape) * 10
    x_q, scale = quantize_activation(x)
    # the formula in float32, each step rounded once: nothing is left to interpretation
    rows = x.numpy()
    expected_scale = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    assert x_q.dtype == torch.int8
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(x_q.numpy(), np.clip(np.rint(rows / expected_scale), -128, 127))
    # and in float64: off by a step only if float32 cannot tell on which side of a tie the value lies
    truth = rows.astype(np.float64) / (np.maximum(np.abs(rows.astype(np.float64)).max(-1, keepdims=True), 1e-5) / 127)
    assert np.abs(x_q.numpy() - truth).max() <= 0.5 + 127 * 2 * np.finfo(np.float32).eps


def test_each_expert_has_its_own_scale():
    weight = torch.randn(3, 7, 5) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
    ternary, scale = quantize_weight(weight)
    for expert in range(3):
        one_ternary, one_scale = quantize_weight(weight[expert])
        assert torch.equal(ternary[expert], one_ternary)
        assert torch.equal(scale[expert], one_scale)


def test_gaussian_weights_have_the_known_zeros_and_errors():
    # a million draws: the standard error of each figure is below 0.0006
    weight = torch.randn(1000, 1000)
    ternary, scale = quantize_weight(weight)
    power = weight.square().sum()
    assert float((ternary == 0).double().mean()) == pytest.approx(0.310, abs=0.002)
    assert float((weight - ternary * scale).square().sum() / power) == pytest.approx(0.264, abs=0.002)
    refitted = (weight * ternary).sum() / ternary.float().square().sum()
    assert float((weight - ternary * refitted).square().sum() / power) == pytest.approx(0.213, abs=0.002)


def test_rounding_is_half_to_even():
    ternary, scale = quantize_weight(torch.tensor([[0.5, -0.5, 1.5, -1.5]]))
    assert scale.item() == 1
    assert ternary.tolist() == [[0, 0, 1, -1]]
    x_q, _ = quantize_activation(torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]]))
    assert x_q.tolist() == [[127, 0, 2, 0, -2]]


def test_zeros_stay_zero_with_a_finite_scale():
    ternary, weight_scale = quantize_weight(torch.zeros(3, 7))
    x_q, activation_scale = quantize_activation(torch.zeros(3, 7))
    assert not ternary.any()
    assert not x_q.any()
    assert torch.equal(weight_scale, torch.full((1, 1), MIN_SCALE))
    assert torch.equal(activation_scale, torch.full((3, 1), MIN_SCALE) / 127)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_integers_stay_in_range_at_any_size(size):
    x = torch.randn(33, 7) * size
    x_q, scale = quantize_activation(x)
    ternary, weight_scale = quantize_weight(x)
    assert bool(scale.isfinite().all() and weight_scale.isfinite().all())
    assert x_q.long().abs().max() <= 127
    assert ternary.long().abs().max() <= 1
    if size >= 1:
        assert (x_q.long().abs().amax(dim=-1) == 127).all(), "the largest activation of each row is 127"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    x = torch.randn(7, 33).to(dtype)
    for quantize in (quantize_weight, quantize_activation, fake_quantize_weight, fake_quantize_activation):
        integers, scale = quantize(x)
        expected_integers, expected_scale = quantize(x.float())
        assert scale.dtype == torch.float32
        assert torch.equal(integers, expected_integers)
        assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_fake_quantizers_give_the_same_integers(shape):
    x = torch.randn(shape)
    for fake, true in ((fake_quantize_weight, quantize_weight), (fake_quantize_activation, quantize_activation)):
        fake_integers, fake_scale = fake(x)
        integers, scale = true(x)
        assert fake_integers.dtype == torch.float32
        assert torch.equal(fake_integers, integers.float())
        assert torch.equal(fake_scale, scale)


@pytest.mark.parametrize("quantize", [fake_quantize_weight, fake_quantize_activation])
def test_gradient_passes_the_rounding_unchanged(quantize):
    x = torch.randn(7, 33)
    x[0, 0] = 50.0  # far beyond the clamp of weights
    x[1] = 0.0
    x.requires_grad_()
    integers, scale = quantize(x)
    assert not scale.requires_grad
    upstream = torch.randn(7, 33)
    integers.backward(upstream)
    assert torch.equal(x.grad, upstream / scale)


def test_scale_passes_no_gradient():
    weight = torch.randn(7, 33, requires_grad=True)
    assert not fake_quantize_weight(weight)[1].requires_grad
    assert not fake_quantize_activation(weight)[1].requires_grad
    assert weight_absmean(weight).requires_grad, "the plain scale is differentiable; the fake quantizers detach it"


@pytest.mark.parametrize("shape", SHAPES)
def test_binary_weights_follow_the_sign_formula(shape):
    weight = torch.randn(shape)
    binary, scale = quantize_weight(weight, "binary")
    truth = weight.double().numpy()
    expected = np.where(truth - truth.mean(axis=(-2, -1), keepdims=True) > 0, 1, -1)
    np.testing.assert_array_equal(binary.numpy(), expected)
    assert torch.equal(scale, weight_absmean(weight))
    fake, fake_scale = fake_quantize_weight(weight, "binary")
    assert torch.equal(fake, binary.float())
    assert torch.equal(fake_scale, scale)


def test_binary_gaussian_weights_have_the_known_error():
    weight = torch.randn(1000, 1000)
    binary, scale = quantize_weight(weight, "binary")
    error = (weight - binary * scale).square().sum() / weight.square().sum()
    assert float(error) == pytest.approx(0.363, abs=0.002)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 5, 64), (2, 100)])
def test_int4_weights_follow_the_group_formula(shape):
    weight = torch.randn(shape)
    rounded = fake_quantize_int4(weight).numpy()
    for start in range(0, shape[-1], INT4_GROUP_SIZE):
        group = weight.numpy()[..., start : start + INT4_GROUP_SIZE]
        largest = np.abs(group).max(axis=-1, keepdims=True)
        scale = (largest / np.float32(7)).astype(np.float16).astype(np.float32)
        expected = np.clip(np.rint(group / scale), -7, 7) * scale
        np.testing.assert_array_equal(rounded[..., start : start + INT4_GROUP_SIZE], expected)


@pytest.mark.parametrize("fake", [fake_quantize_int4, lambda w: fake_quantize_weight(w, "binary")[0]])
def test_gradients_of_rounded_weights_pass_unchanged(fake):
    weight, gradient = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    scale = weight_absmean(weight.detach()) if fake is not fake_quantize_int4 else torch.ones(1)
    fake(weight).backward(gradient)
    torch.testing.assert_close(weight.grad, gradient / scale)


@pytest.mark.parametrize(
    ("straight_through", "passes"),
    [("identity", [1, 1, 1, 1]), ("clipped", [1, 0, 1, 1]), ("relu", [0, 0, 1, 1])],
)
def test_straight_through_variants_gate_the_gradient_alone(straight_through, passes):
    x = torch.tensor([[-0.5, -4.0, 0.25, 2.0]], requires_grad=True)
    x_q, scale = fake_quantize_activation(x, straight_through)
    assert torch.equal(x_q, quantize_activation(x.detach())[0].float())
    x_q.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([passes]) / scale)
