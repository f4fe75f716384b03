import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import computing_with, torch_threads, variants_with

from moe_bitnet.errors import ShapeError
from moe_bitnet.quantization import quantize_activation


@pytest.fixture(params=variants_with("quantize_activation"), scope="module", ids=str)
def quantize(request):
    with computing_with(request.param) as variant:
        yield variant.select("quantize_activation")


def assert_equals_the_formula(quantize, x):
    """Bit for bit: numpy in float32 rounds each step once, as the definition says."""
    x_q, scale = quantize(x)
    rows = x.detach().float().numpy()
    absmax = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(1e-5))
    expected_scale = absmax / np.float32(127)
    assert x_q.dtype == torch.int8
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(x_q.numpy(), np.clip(np.rint(rows / expected_scale), -128, 127).astype(np.int8))
    reference_x_q, reference_scale = quantize_activation(x)
    assert torch.equal(x_q, reference_x_q)
    assert torch.equal(scale, reference_scale)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    exponent=st.integers(-44, 37),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula_on_any_shape_and_size(quantize, shape, exponent, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    assert_equals_the_formula(quantize, x)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70))
def test_equals_the_formula_on_any_floats(quantize, values):
    assert_equals_the_formula(quantize, torch.tensor([values]))


@pytest.mark.parametrize("num_features", [1, 15, 16, 17, 63, 64, 65, 4099])
def test_equals_the_formula_around_whole_vectors(quantize, num_features):
    assert_equals_the_formula(quantize, torch.randn(13, num_features))


def test_the_largest_value_is_found_wherever_it_is(quantize):
    x = torch.randn(69, 69)
    x[torch.arange(69), torch.arange(69)] = 100.0 * (-1) ** torch.arange(69)
    assert_equals_the_formula(quantize, x)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(quantize, num_threads):
    # large enough that the work is worth three threads
    with torch_threads(num_threads):
        assert_equals_the_formula(quantize, torch.randn(65, 1001))


def test_ties_go_to_the_even_integer(quantize):
    # the absmax of 127 makes the scale 1: every half is a tie
    halves = torch.arange(-126.5, 127.0, 1.0)
    x = torch.cat((torch.tensor([127.0]), halves)).unsqueeze(0)
    x_q, scale = quantize(x)
    assert scale.item() == 1
    assert x_q[0, 1:].tolist() == [round(half) for half in halves.tolist()]
    assert_equals_the_formula(quantize, x)


@pytest.mark.parametrize("power", [-10, 3, 20])
def test_ties_at_other_scales(quantize, power):
    x = torch.cat((torch.tensor([-127.0]), torch.arange(-126.5, 127.0, 0.5))).unsqueeze(0) * 2.0**power
    assert_equals_the_formula(quantize, x)


def test_denormals_and_zeros(quantize):
    x = torch.tensor([[1e-45, -1e-40, 1e-38], [0.0, -0.0, 0.0], [1e-45, 1.0, -1e-40], [1e-5, -9e-6, 4e-8]])
    assert_equals_the_formula(quantize, x)


def test_largest_values(quantize):
    largest = torch.finfo(torch.float32).max
    assert_equals_the_formula(quantize, torch.tensor([[largest, -largest, 1.0, largest / 2], [-largest, 0, 1e30, 1]]))


def test_one_outlier_in_a_row_leaves_other_rows_alone(quantize):
    x = torch.randn(7, 33)
    before, _ = quantize(x)
    x[3, 5] = 1e6
    after, _ = quantize(x)
    keep = torch.arange(7) != 3
    assert torch.equal(after[keep], before[keep])
    assert after[3].count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(quantize, dtype):
    x = (torch.randn(7, 33) * 3).to(dtype)
    assert_equals_the_formula(quantize, x)


def test_strides_do_not_matter(quantize):
    x = torch.randn(33, 14)
    for view in (x.T, x[:, ::2], x[::3], x[1:, 3:], x[:1].expand(7, 14), x.view(3, 11, 14).transpose(0, 1)):
        x_q, scale = quantize(view)
        expected_x_q, expected_scale = quantize(view.contiguous())
        assert torch.equal(x_q, expected_x_q)
        assert torch.equal(scale, expected_scale)
        assert_equals_the_formula(quantize, view)


def test_the_input_is_not_changed(quantize):
    x = torch.randn(7, 33)
    before = x.clone()
    quantize(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows_give_no_rows(quantize, shape):
    x_q, scale = quantize(torch.empty(shape))
    assert x_q.shape == shape
    assert scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("shape", [(7, 0), (0,), ()])
def test_rows_without_features_are_refused(quantize, shape):
    with pytest.raises(ShapeError, match="at least one feature"):
        quantize(torch.empty(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_features", [1, 7, 33])
def test_a_row_that_is_not_finite_shows_it_in_its_scale_alone_and_spares_the_others(quantize, value, num_features):
    x = torch.randn(3, num_features)
    expected_x_q, expected_scale = quantize(x)
    for position in range(num_features):
        bad = x.clone()
        bad[1, position] = value
        x_q, scale = quantize(bad)
        assert not scale[1].isfinite()
        assert not x_q[1].any()
        assert torch.equal(x_q[[0, 2]], expected_x_q[[0, 2]])
        assert torch.equal(scale[[0, 2]], expected_scale[[0, 2]])
