"""Tolerances derived from a float64 truth, so that no test guesses one.

A result is right if its error is at most that of the plain low-precision path
(the same formula, written directly) plus two units in the last place.
"""

import copy

import torch


def ulp_at(x):
    """The distance from the largest ``|x|`` to the next float32."""
    largest = x.abs().max().float() if x.numel() else torch.tensor(0.0)
    return float(torch.nextafter(largest, torch.tensor(float("inf"))) - largest)


def largest_error(x, truth):
    return float((x.double() - truth.double()).abs().max()) if x.numel() else 0.0


def assert_close_to_truth(actual, plain, truth):
    """Assert that ``actual`` is as near to the float64 ``truth`` as ``plain`` is, up to two ulps of the largest value."""
    assert truth.dtype == torch.float64
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert bool(actual.isfinite().all()), "not finite"
    error = largest_error(actual, truth)
    allowed = largest_error(plain, truth) + 2 * ulp_at(truth)
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"


def one_ulp_noise(model, compute, num_draws=4):
    """How far ``compute(model)`` moves if every weight of a float model moves by at most one ulp.

    Two float32 evaluations of the same formula in another order differ by no more than a few times this.
    """
    generator = torch.Generator().manual_seed(0)
    before, largest = compute(model), 0.0
    for _ in range(num_draws):
        shaken = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in shaken.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + sign * torch.finfo(torch.float32).eps)
        largest = max(largest, float((compute(shaken) - before).abs().max()))
    return largest
