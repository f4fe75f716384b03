import math

import torch

from kvcache.scale import covering_scale_code, nearest_scale_code, scales


def test_sixteen_steps_double_the_scale():
    assert torch.equal(scales()[16:], 2 * scales()[:-16])
    assert scales()[13 * 16] == 1


def test_nearest_code_is_within_half_a_step():
    scale = torch.logspace(-3.8, 0.8, 50, dtype=torch.float64)
    octaves = (scales()[nearest_scale_code(scale)].double() / scale).log2().abs()
    assert octaves.max() <= 0.5 / 16 + 1e-6


def test_nearest_code_stays_on_the_grid():
    assert nearest_scale_code(torch.tensor([0.0, 1e-30, 1e30], dtype=torch.float64)).tolist() == [0, 0, 255]


def test_covering_code_is_the_smallest_that_reaches():
    largest = torch.logspace(-1, 2.5, 40)
    codes = covering_scale_code(largest, 127)
    assert (scales()[codes] * 127 >= largest).all()
    assert (scales()[codes - 1] * 127 < largest).all()
    assert covering_scale_code(torch.tensor(math.inf), 127) == 255
