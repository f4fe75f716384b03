import numpy as np
import pytest
import torch

from cluster.partial_sums import sum_pairs, to_format
from cluster.transport.frames import CombineFrame

EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}
"""Largest relative error of rounding float32 once."""


def random_pairs(pairs_per_row, hidden_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_pairs = sum(pairs_per_row)
    outputs = torch.randn(num_pairs, hidden_size, generator=generator)
    return outputs, torch.rand(num_pairs, generator=generator), torch.tensor(pairs_per_row, dtype=torch.int64)


def sums_in_order(outputs, weights, pairs_per_row, dtype):
    """The plain twin: one pair after the other."""
    outputs, weights = outputs.numpy().astype(dtype), weights.numpy().astype(dtype)
    sums, pair = [], 0
    for count in pairs_per_row.tolist():
        total = outputs[pair] * weights[pair]
        for index in range(pair + 1, pair + count):
            total = total + outputs[index] * weights[index]
        sums.append(total)
        pair += count
    return np.array(sums, dtype).reshape(len(sums), outputs.shape[1])


@pytest.mark.parametrize("hidden_size", [1, 7, 33])
@pytest.mark.parametrize(
    "pairs", [[1], [5], [1, 1, 1], [2, 2], [1, 3, 2], [8, 1, 255, 1], [1] * 32 + [2], [1, 8] * 300], ids=len
)
def test_each_row_is_the_sum_of_its_pairs_in_their_order(pairs, hidden_size):
    outputs, weights, pairs_per_row = random_pairs(pairs, hidden_size)
    sums = sum_pairs(outputs, weights, pairs_per_row)
    assert sums.dtype == torch.float32
    assert np.array_equal(sums.numpy(), sums_in_order(outputs, weights, pairs_per_row, np.float32))
    exact = sums_in_order(outputs, weights, pairs_per_row, np.float64)
    magnitude = sums_in_order(outputs.abs(), weights, pairs_per_row, np.float64)
    # one rounding of each product, and one of each partial sum
    assert (np.abs(sums.numpy() - exact) <= (max(pairs) + 1) * 2.0**-24 * magnitude).all()


def test_the_order_shows_where_it_matters():
    outputs = torch.tensor([[2.0**24], [1.0], [1.0], [1.0], [1.0], [2.0**24]])
    sums = sum_pairs(outputs, torch.ones(6), torch.tensor([3, 3]))
    assert sums.tolist() == [[2.0**24], [2.0**24 + 2]]


def test_no_row_depends_on_its_neighbours():
    outputs, weights, pairs_per_row = random_pairs([2, 1, 3], 33)
    together = sum_pairs(outputs, weights, pairs_per_row)
    for row, (start, stop) in enumerate(((0, 2), (2, 3), (3, 6))):
        alone = sum_pairs(outputs[start:stop], weights[start:stop], pairs_per_row[row : row + 1])
        assert torch.equal(alone[0], together[row])
    outputs[3:] = float("nan")
    assert torch.equal(sum_pairs(outputs, weights, pairs_per_row)[:2], together[:2])


def test_no_rows_are_no_sums():
    empty = sum_pairs(torch.empty(0, 7), torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert empty.shape == (0, 7)
    for row_format in ("int8", *EPSILON):
        rows, scales = to_format(empty, row_format)
        assert rows.shape == (0, 7)
        assert (scales is not None) == (row_format == "int8")


@pytest.mark.parametrize("row_format", EPSILON)
def test_floats_are_rounded_once(row_format):
    rows = random_pairs([1] * 33, 7)[0]
    rounded, scales = to_format(rows, row_format)
    assert scales is None
    assert rounded.dtype == getattr(torch, row_format)
    error = (rounded.double() - rows.double()).abs()
    assert (error <= EPSILON[row_format] * rows.double().abs() + 2.0**-25).all()
    if row_format == "float32":
        assert torch.equal(rounded, rows)


def test_int8_rows_are_off_by_half_a_step_at_most():
    rows = random_pairs([1] * 33, 7)[0]
    rows[3] = 0
    quantized, scales = to_format(rows, "int8")
    assert (quantized.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (33, 1))
    values = CombineFrame(0, 0, quantized, scales).values()
    step = rows.double().abs().amax(dim=1, keepdim=True) / 127
    assert ((values.double() - rows.double()).abs() <= step * (0.5 + 1e-4)).all()
    assert torch.equal(values[3], rows[3])
