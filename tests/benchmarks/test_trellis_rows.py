import pytest
import torch

from benchmarks.kv_trellis import fit_levels, round_levels, snr_db
from benchmarks.trellis_rows import encode_windows, nearest_path_levels
from kvcache.trellis import LEVEL_UNIT, LEVELS, encode_rows, level_table


@pytest.mark.parametrize("num_bits", [4, 2, 1])
def test_windows_are_those_of_the_reference(num_bits):
    x = torch.randn(33, 17) / LEVEL_UNIT
    windows, squared_error = encode_windows(x, level_table(num_bits), num_bits)
    expected = encode_rows(x, num_bits)
    assert torch.equal(level_table(num_bits)[windows], expected.levels)
    assert torch.equal(squared_error, expected.squared_error)
    grouped = nearest_path_levels(x.unflatten(0, (3, 11)), level_table(num_bits), num_bits)
    assert torch.equal(grouped, expected.levels.unflatten(0, (3, 11)))


@pytest.mark.parametrize(("num_bits", "least_db"), [(4, 20.22), (2, 9.30), (1, 4.40)])
def test_committed_levels_beat_plain_codes(num_bits, least_db):
    assert snr_db(LEVELS[num_bits], num_bits, num_rows=200) > least_db


def test_fitting_lowers_the_error():
    first, later = (snr_db(round_levels(fit_levels(2, 17, steps, 300)), 2, 200) for steps in (0, 5))
    assert later > first + 1
