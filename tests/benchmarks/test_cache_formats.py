import pytest
import torch

from benchmarks.cache_formats import (
    alike_format,
    asymmetric,
    centred_format,
    ggml_q4_0,
    paged_format,
    rotated,
    short_format,
    symmetric,
    trellis,
    unsegmented_format,
)
from kvcache.config import KVCacheConfig
from kvcache.moments import Moments
from kvcache.trellis import KEPT_SHARE

HEAD_DIM = 32


def config(key_bits, value_bits):
    return KVCacheConfig(1, 2, HEAD_DIM, key_bits, value_bits)


def snr_db(x, read):
    return float(10 * (x.square().mean() / (read - x).square().mean()).log10())


@pytest.mark.parametrize(
    ("plane", "least_db"),
    [
        (symmetric(8, HEAD_DIM), 43),
        (symmetric(4, HEAD_DIM), 18),
        (asymmetric(4, HEAD_DIM), 19),
        (asymmetric(4, 32, is_per_channel=True), 19),
        (ggml_q4_0, 19),
        (rotated(symmetric(4, HEAD_DIM)), 18),
        (rotated(trellis(4, is_along_tokens=False)), 20),
        (rotated(trellis(4, is_along_tokens=True)), 20),
    ],
)
def test_planes_keep_gaussians_as_well_as_expected(plane, least_db):
    x = torch.randn(2, 128, HEAD_DIM)
    read = plane(x)
    assert read.shape == x.shape
    assert least_db < snr_db(x, read) < least_db + 5


def test_q4_0_reaches_its_extremes():
    x = torch.linspace(-7, 8, 32)[None, None]  # the scale is -1: 8 becomes level -8
    assert torch.equal(ggml_q4_0(x)[0, 0, -1], torch.tensor(8.0))


def test_zeros_stay_zeros():
    x = torch.zeros(1, 64, HEAD_DIM)
    for plane in (symmetric(4, HEAD_DIM), asymmetric(2, HEAD_DIM), ggml_q4_0):
        assert torch.equal(plane(x), x)


def test_paged_formats_keep_the_tail_and_16_bits():
    key, value = torch.randn(2, 2, 70, HEAD_DIM)
    moments = Moments.zeros(1, 2, HEAD_DIM)
    moments.add(0, *torch.randn(3, 200, 2, HEAD_DIM))
    for named in (
        paged_format("plain", config(4, 16), None),
        paged_format("calibrated", config(4, 16), moments),
        centred_format("centred", config(4, 16), moments),
        unsegmented_format("unsegmented", config(4, 16), moments),
        short_format("short", config(4, 16), moments),
        alike_format("alike", config(4, 16), moments),
    ):
        read_key, read_value = named.quantize(0, key, value)
        assert torch.equal(read_key[:, 64:], key[:, 64:])
        assert 18 < snr_db(key[:, :64], read_key[:, :64]) < 25
        assert torch.equal(read_value[:, :64], value[:, :64].half().float())
        assert (named.key_bits, named.value_bits) == (4.25, 16)


def test_only_what_is_not_lengthened_comes_back_short():
    key, value = torch.randn(2, 2, 256, HEAD_DIM)
    moments = Moments.zeros(1, 2, HEAD_DIM)
    moments.add(0, *torch.randn(3, 2000, 2, HEAD_DIM))
    slopes = []
    for named in (paged_format("paged", config(16, 2), moments), short_format("short", config(16, 2), moments)):
        slopes.append(float((named.quantize(0, key, value)[1] * value).sum() / value.square().sum()))
    assert slopes == pytest.approx([1.0, KEPT_SHARE[2]], abs=0.02)


def test_attention_is_left_out_of_maps_where_all_tokens_are_alike():
    key, value = torch.randn(2, 2, 64, HEAD_DIM)
    query = torch.randn(400, 2, HEAD_DIM)
    plain, attended = Moments.zeros(1, 2, HEAD_DIM), Moments.zeros(1, 2, HEAD_DIM)
    for moments in (plain, attended):
        moments.add(0, query, query, query)
    attended.add_attended(0, query, query, query, 1.0)
    alike = alike_format("alike", config(4, 4), attended).quantize(0, key, value)
    expected = paged_format("plain", config(4, 4), plain).quantize(0, key, value)
    weighted = paged_format("weighted", config(4, 4), attended).quantize(0, key, value)
    for plane in range(2):
        assert torch.equal(alike[plane], expected[plane])
        assert not torch.equal(weighted[plane], expected[plane])
