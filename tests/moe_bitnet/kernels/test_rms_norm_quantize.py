"""``rms_norm_quantize``: norm and quantization in one call, the same bits as one after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import computing_with, operations_without_library, seeded, torch_threads, variants_with

from moe_bitnet.errors import ShapeError
from moe_bitnet.inference_math import rms_norm
from moe_bitnet.quantization import quantize_activation

EPS = 1e-5


@pytest.fixture(params=variants_with("rms_norm_quantize"), scope="module", ids=str)
def norm_quantize(request):
    with computing_with(request.param) as variant:
        yield variant.select("rms_norm_quantize")


def assert_equals_the_formula(norm_quantize, x, gain, eps=EPS):
    """Bit for bit: the factor in float64, rounded once; then every float32 step of numpy rounds once."""
    x_q, scale = norm_quantize(x, gain, eps)
    rows = x.float().numpy()
    factor = 1 / np.sqrt((rows.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + eps)
    normed = rows * factor.astype(np.float32) * gain.numpy()
    expected_scale = np.maximum(np.abs(normed).max(axis=-1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    assert x_q.dtype == torch.int8
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(x_q.numpy(), np.clip(np.rint(normed / expected_scale), -128, 127).astype(np.int8))
    reference_x_q, reference_scale = quantize_activation(rms_norm(x, eps) * gain)
    assert torch.equal(x_q, reference_x_q)
    assert torch.equal(scale, reference_scale)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 13),
    num_features=st.integers(1, 140),
    exponent=st.integers(-20, 18),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula_on_any_shape_and_size(norm_quantize, num_rows, num_features, exponent, seed):
    generator = seeded(seed)
    x = torch.randn(num_rows, num_features, generator=generator) * 10.0**exponent
    assert_equals_the_formula(norm_quantize, x, torch.randn(num_features, generator=generator))


@pytest.mark.parametrize("num_features", [1, 15, 16, 17, 63, 64, 65, 4099])
def test_equals_the_formula_around_whole_vectors(norm_quantize, num_features):
    assert_equals_the_formula(norm_quantize, torch.randn(7, num_features), torch.randn(num_features))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_rows_of_zeros_give_zeros_and_a_finite_scale(norm_quantize, eps):
    x = torch.randn(3, 33)
    x[1] = 0
    x_q, scale = norm_quantize(x, torch.ones(33), eps)
    assert not x_q[1].any()
    assert bool(scale.isfinite().all())
    assert_equals_the_formula(norm_quantize, x, torch.ones(33), eps)


def test_large_rows_do_not_overflow(norm_quantize):
    # the square of 1e30 is infinite in float32
    assert_equals_the_formula(norm_quantize, torch.tensor([[1e30, -2e30, 3e29], [1e-30, 0, -1e-30]]), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(norm_quantize, dtype):
    assert_equals_the_formula(norm_quantize, torch.randn(7, 33).to(dtype), torch.randn(33))


def test_strides_do_not_matter_and_the_input_is_not_changed(norm_quantize):
    x, gain = torch.randn(33, 14), torch.randn(66)
    for view in (x.T, x.T[::2], x.T[1:]):
        before = view.clone()
        x_q, scale = norm_quantize(view, gain[::2], EPS)
        expected_x_q, expected_scale = norm_quantize(view.contiguous(), gain[::2].contiguous(), EPS)
        assert torch.equal(x_q, expected_x_q)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(view, before)


def test_no_rows_give_no_rows(norm_quantize):
    x_q, scale = norm_quantize(torch.empty(0, 33), torch.ones(33), EPS)
    assert x_q.shape == (0, 33)
    assert scale.shape == (0, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_features", [1, 7, 33])
def test_a_row_that_is_not_finite_shows_it_in_its_scale_alone_and_spares_the_others(norm_quantize, value, num_features):
    x, gain = torch.randn(3, num_features), torch.randn(num_features)
    expected_x_q, expected_scale = norm_quantize(x, gain, EPS)
    for position in range(num_features):
        bad = x.clone()
        bad[1, position] = value
        x_q, scale = norm_quantize(bad, gain, EPS)
        assert not scale[1].isfinite()
        assert not x_q[1].any()
        assert torch.equal(x_q[[0, 2]], expected_x_q[[0, 2]])
        assert torch.equal(scale[[0, 2]], expected_scale[[0, 2]])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(norm_quantize, num_threads):
    # large enough that the work is worth three threads
    x, gain = torch.randn(65, 1001), torch.randn(1001)
    with torch_threads(num_threads):
        assert_equals_the_formula(norm_quantize, x, gain)


@pytest.mark.parametrize("gain", [torch.ones(32), torch.ones(34), torch.ones(1), torch.ones(1, 33), torch.ones(())])
def test_a_gain_of_another_shape_is_refused_before_the_library_is_called(gain):
    with pytest.raises(ShapeError, match="33 features"):
        operations_without_library().rms_norm_quantize(torch.ones(3, 33), gain, EPS)


@pytest.mark.parametrize("shape", [(7, 0), (0,), ()])
def test_rows_without_features_are_refused(norm_quantize, shape):
    with pytest.raises(ShapeError, match="at least one feature"):
        norm_quantize(torch.empty(shape), torch.ones(shape[-1:]), EPS)
