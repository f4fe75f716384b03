import itertools
import math

import pytest
import torch

from kvcache import trellis


@pytest.mark.parametrize("num_bits", [4, 2, 1])
def test_levels_are_int8_for_every_window(num_bits):
    levels = trellis.LEVELS[num_bits]
    assert len(levels) == trellis.NUM_WINDOWS
    assert all(-127 <= level <= 127 for level in levels)


@pytest.mark.parametrize(("num_bits", "num_elements"), [(1, 9), (2, 5), (4, 3)])
def test_encoder_finds_the_best_of_all_codes(num_bits, num_elements):
    """Every sequence of codes is tried: none is nearer than the encoder's."""
    everything = torch.tensor(list(itertools.product(range(1 << num_bits), repeat=num_elements)), dtype=torch.uint8)
    candidates = trellis.decode_rows(everything, num_bits).double()
    x = torch.randn(6, num_elements, generator=torch.Generator().manual_seed(num_bits)) / trellis.LEVEL_UNIT
    encoded = trellis.encode_rows(x, num_bits)
    least = (x.double()[:, None] - candidates).square().sum(dim=2).amin(dim=1)
    torch.testing.assert_close((x.double() - encoded.levels.double()).square().sum(dim=1), least, rtol=1e-5, atol=0)
    torch.testing.assert_close(encoded.squared_error.double(), least, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_bits", [4, 2, 1])
@pytest.mark.parametrize("num_elements", [1, 2, 7, 64])
def test_decoder_looks_up_what_the_encoder_meant(num_bits, num_elements):
    x = torch.randn(5, num_elements, generator=torch.Generator().manual_seed(1)) / trellis.LEVEL_UNIT
    encoded = trellis.encode_rows(x, num_bits)
    assert encoded.codes.max() < 1 << num_bits
    assert torch.equal(trellis.decode_rows(encoded.codes, num_bits), encoded.levels)


def test_window_is_six_bits_of_the_stream_with_zeros_behind_the_end():
    codes = torch.tensor([[3, 9, 14]], dtype=torch.uint8)
    stream = 3 | 9 << 4 | 14 << 8
    expected = [trellis.LEVELS[4][stream >> (4 * element) & 63] for element in range(3)]
    assert trellis.decode_rows(codes, 4).tolist() == [expected]


@pytest.mark.parametrize(("num_bits", "lloyd_max_db", "gain_db"), [(4, 20.22, 1.2), (2, 9.30, 1.2), (1, 4.40, 0.7)])
def test_gaussian_rows_are_nearer_than_with_the_best_plain_code(num_bits, lloyd_max_db, gain_db):
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(7))
    levels = trellis.encode_rows(x / trellis.LEVEL_UNIT, num_bits).levels * trellis.LEVEL_UNIT
    signal_to_noise_db = -10 * math.log10((x - levels).square().mean() / x.square().mean())
    assert signal_to_noise_db > lloyd_max_db + gain_db


@pytest.mark.parametrize("num_bits", [4, 2, 1])
def test_levels_keep_the_share_that_is_written_down(num_bits):
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(3)).double()
    levels = trellis.encode_rows((x / trellis.LEVEL_UNIT).float(), num_bits).levels * trellis.LEVEL_UNIT
    kept = (x * levels).mean() / x.square().mean()
    # over 25,600 elements the estimate is off by about sqrt(share lost / 25,600): 0.003 at 1 bit
    assert abs(kept - trellis.KEPT_SHARE[num_bits]) < 4 * math.sqrt((1 - trellis.KEPT_SHARE[num_bits]) / x.numel())


def test_ties_go_to_the_first_code():
    encoded = trellis.encode_rows(torch.full((1, 3), 1e20), 4)  # every path costs the same: infinity
    assert encoded.codes.tolist() == [[0, 0, 0]]
