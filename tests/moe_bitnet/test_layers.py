import contextlib

import pytest
import torch
from numerics import assert_close_to_truth, ulp_at

from moe_bitnet.layers import RMSNorm, apply_rotary, rms_norm, rotary_tables

EPS = 1e-5


def plain_rms_norm(x, gain, dtype):
    x, gain = x.to(dtype), gain.to(dtype)
    return gain * (x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt())


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 7)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("gradients", [contextlib.nullcontext, torch.no_grad])
def test_rms_norm_equals_the_float64_formula(shape, size, gradients):
    # training and inference round their factor differently; both must be near the truth
    x, gain = torch.randn(shape) * size, torch.randn(shape[-1])
    norm = RMSNorm(shape[-1], EPS)
    norm.weight.data.copy_(gain)
    truth = plain_rms_norm(x, gain, torch.float64)
    with gradients():
        assert_close_to_truth(norm(x), plain_rms_norm(x, gain, torch.float32), truth)


def test_rms_norm_computes_half_precision_in_float32():
    x = torch.randn(7, 33).bfloat16()
    assert rms_norm(x, EPS).dtype == torch.float32
    assert torch.equal(rms_norm(x, EPS), rms_norm(x.float(), EPS))


def test_rms_norm_of_zeros_is_zero():
    assert not rms_norm(torch.zeros(3, 7), EPS).any()


def rotate(x, positions, theta=10_000.0):
    return apply_rotary(x, *rotary_tables(positions, x.shape[-1], theta))


def rotate_complex(x, positions, theta):
    """The paper's form in float64: feature i and i + D/2 are one complex number, turned by position · theta^(-2i/D)."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, None] * theta ** (-torch.arange(half).double() / half)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotary_equals_complex_multiplication(head_dim, theta):
    x, positions = torch.randn(2, 7, 3, head_dim), torch.arange(7)
    actual, truth = rotate(x, positions, theta), rotate_complex(x, positions, theta)
    # the angle is rounded to float32: below 7 radians by an ulp of 7 for frequency and product each; then two ulps
    allowed = x.abs().max() * 2 * ulp_at(positions.float()) * 2 + 2 * ulp_at(truth)
    assert (actual.double() - truth).abs().max() <= allowed


def test_rotary_keeps_norms():
    x = torch.randn(33, 3, 8)
    before, after = x.norm(dim=-1), rotate(x, torch.arange(1000, 1033)).norm(dim=-1)
    assert (before - after).abs().max() <= 4 * ulp_at(before)


def test_rotary_leaves_position_zero_alone():
    x = torch.randn(1, 3, 8)
    assert torch.equal(rotate(x, torch.tensor([0])), x)


def test_rotary_products_depend_on_distance_alone():
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def product(query_position, key_position):
        turned = rotate(query, torch.tensor([query_position])) * rotate(key, torch.tensor([key_position]))
        return float(turned.sum())

    bound = float(query.norm() * key.norm())
    for shift in (1, 7, 33):
        # angles up to 40 carry an error of an ulp of 40 each
        assert abs(product(5, 2) - product(5 + shift, 2 + shift)) <= bound * 4 * ulp_at(torch.tensor(40.0))
    assert abs(product(5, 2) - product(5, 3)) > 1e-3 * bound


def test_rotary_positions_continue():
    x = torch.randn(7, 3, 8)
    whole = rotate(x, torch.arange(7))
    assert torch.equal(rotate(x[3:], torch.arange(3, 7)), whole[3:])
