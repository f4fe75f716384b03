"""The float steps of inference: what they promise beyond their formulas is that no order or place changes a bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bitnet.inference_math import gated_activation, rms_norm

EPS = 1e-5
EXTREMES = [0.0, -0.0, 88.0, 89.0, 104.0, 710.0, 1e4, 1e-45, 1e-38, 3e38, float("inf")]
GATES = torch.tensor([sign * value for value in EXTREMES for sign in (1, -1)] + [float("nan")])


def once_rounded_silu(gate):
    """SiLU's two float32 products and sigmoid by numpy in float64, rounded once."""
    with np.errstate(over="ignore"):
        return gate * torch.from_numpy((1 / (1 + np.exp(-gate.double().numpy()))).astype(np.float32))


@settings(deadline=None, max_examples=40)
@given(num_features=st.integers(1, 200), exponent=st.integers(-20, 18), seed=st.integers(0, 2**31))
def test_rms_norm_rounds_its_factor_once(num_features, exponent, seed):
    x = torch.randn(3, num_features, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    rows = x.numpy().astype(np.float64)
    factor = (1 / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + EPS)).astype(np.float32)
    assert torch.equal(rms_norm(x, EPS), x * torch.from_numpy(factor))


@settings(deadline=None, max_examples=40)
@given(num_features=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_rms_norm_does_not_depend_on_the_order_of_features(num_features, seed):
    generator = torch.Generator().manual_seed(seed)
    x, order = torch.randn(3, num_features, generator=generator), torch.randperm(num_features, generator=generator)
    assert torch.equal(rms_norm(x[:, order], EPS), rms_norm(x, EPS)[:, order])


def test_rms_norm_of_large_values_does_not_overflow():
    # in float32 the square of 1e30 is infinite
    assert torch.equal(rms_norm(torch.full((1, 7), 1e30), EPS), torch.ones(1, 7))


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
def test_an_activation_does_not_depend_on_the_place_of_an_element(activation):
    # torch's vectorized SiLU rounds the elements behind the last whole vector by another formula
    gate, up = torch.randn(1000) * 5, torch.randn(1000)
    whole = gated_activation(gate, up, activation)
    one_by_one = torch.cat([gated_activation(gate[i : i + 1], up[i : i + 1], activation) for i in range(1000)])
    assert torch.equal(whole, one_by_one)


def test_swiglu_rounds_its_sigmoid_once():
    gate, up = torch.randn(10_000) * 20, torch.randn(10_000)
    assert torch.equal(gated_activation(gate, up, "swiglu"), once_rounded_silu(gate) * up)


def test_swiglu_of_extreme_gates_has_the_limits_of_the_formula():
    up = torch.full_like(GATES, 2.0)
    actual = gated_activation(GATES, up, "swiglu")
    torch.testing.assert_close(actual, once_rounded_silu(GATES) * up, rtol=0, atol=0, equal_nan=True)
    limits = gated_activation(torch.tensor([-1e4, -3e38, 1e4, 3e38]), torch.ones(4), "swiglu")
    assert limits.tolist() == [0, 0, 1e4, torch.tensor(3e38).item()]


def test_squared_relu_is_its_formula_and_keeps_nan():
    gate, up = torch.randn(1000), torch.randn(1000)
    positive = np.maximum(gate.numpy(), 0)
    assert torch.equal(gated_activation(gate, up, "squared_relu"), torch.from_numpy(positive * positive) * up)
    assert gated_activation(torch.tensor([float("nan")]), torch.ones(1), "squared_relu").isnan()
