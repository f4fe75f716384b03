"""Tolerances derived from a float64 truth, so that no test guesses one.

A result is right if its error is at most that of the plain low-precision path
(the same formula, written directly) plus two units in the last place. In a chain
of several steps the plain path may be lucky once; there its error is the largest
over a few runs whose inputs are off by one unit in the last place.
"""

import copy

import torch

EPS = torch.finfo(torch.float32).eps


def rms(x, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def straight_through_linear(x, weight):
    """BitLinear as the paper defines it, in the dtype of its inputs.

    Rounding adds a constant, and scales are constants: that is the straight-through gradient.
    """
    activation_scale = (x.abs().max(-1, keepdim=True).values.clamp(min=1e-5) / 127).detach()
    weight_scale = weight.abs().mean().clamp(min=1e-5).detach()
    x_unit, weight_unit = x / activation_scale, weight / weight_scale
    x_q = x_unit + (x_unit.round().clamp(-128, 127) - x_unit).detach()
    weight_q = weight_unit + (weight_unit.round().clamp(-1, 1) - weight_unit).detach()
    return (x_q @ weight_q.T) * activation_scale * weight_scale


def with_gradients(function, upstream):
    """Return a function that gives the output of ``function`` and the gradient of each of its inputs."""

    def run(*inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            output = function(*leaves)
            output.backward(upstream.to(output.dtype))
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    return run


def assert_matches_definition(actual, definition, inputs, num_draws=8):
    """Assert that each tensor of ``actual`` is as near to the definition's float64 result as its float32 results are.

    Args:
        actual: list of tensors.
        definition: takes ``inputs`` in any float dtype, returns a list like ``actual``.
        inputs: float32 tensors.
        num_draws: runs of the float32 definition with inputs off by one ulp.
    """
    generator = torch.Generator().manual_seed(0)
    truth = definition(*(x.detach().double() for x in inputs))
    plain_runs = [definition(*(x.detach() for x in inputs))]
    for _ in range(num_draws):
        plain_runs.append(definition(*(shake(x.detach(), generator) for x in inputs)))
    for index, (mine, high) in enumerate(zip(actual, truth, strict=True)):
        assert high.dtype == torch.float64
        assert mine.shape == high.shape, f"tensor {index}: shape {tuple(mine.shape)}, expected {tuple(high.shape)}"
        assert bool(mine.isfinite().all()), f"tensor {index} is not finite"
        error = largest_error(mine, high)
        allowed = max(largest_error(plain[index], high) for plain in plain_runs) + 2 * ulp_at(high)
        assert error <= allowed, f"tensor {index}: error {error:.3e} exceeds {allowed:.3e}"


def shake(x, generator):
    """Move every element of ``x`` by about one ulp, up or down."""
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    return x * (1 + sign * EPS)


def ulp_at(x):
    """The distance from the largest ``|x|`` to the next float32."""
    largest = x.detach().abs().max().float() if x.numel() else torch.tensor(0.0)
    return float(torch.nextafter(largest, torch.tensor(float("inf"))) - largest)


def largest_error(x, truth):
    return float((x.detach().double() - truth.detach().double()).abs().max()) if x.numel() else 0.0


def assert_close_to_truth(actual, plain, truth):
    """Assert that ``actual`` is as near to the float64 ``truth`` as ``plain`` is, up to two ulps."""
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
                parameter.copy_(shake(parameter, generator))
        largest = max(largest, float((compute(shaken) - before).abs().max()))
    return largest
