import pytest

from kvcache.page import LayerFormat, PageFormat, key_plane_format, value_plane_format
from moe_bitnet.errors import ConfigError


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("num_bits", [8, 4, 2])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_segments_fill_the_stream_in_whole_words(head_dim, num_bits, is_calibrated):
    plane = key_plane_format(num_bits, head_dim, is_calibrated)
    assert sum(segment.num_elements for segment in plane.segments) == head_dim
    assert sum(segment.num_words for segment in plane.segments) == head_dim * num_bits // 32
    assert all(segment.num_elements * segment.num_bits % 32 == 0 for segment in plane.segments)
    assert plane.plane_bytes % 64 == 0
    assert plane.plane_bytes == key_plane_format(num_bits, head_dim, False).plane_bytes


@pytest.mark.parametrize(
    ("head_dim", "num_bits", "segments"),
    [
        (64, 4, [(8, 8), (40, 4), (16, 2)]),
        (128, 4, [(16, 8), (80, 4), (32, 2)]),
        (80, 4, [(8, 8), (56, 4), (16, 2)]),
        (64, 2, [(16, 4), (16, 2), (32, 1)]),
        (128, 2, [(32, 4), (32, 2), (64, 1)]),
        (96, 2, [(16, 4), (48, 2), (32, 1)]),
        (64, 8, [(64, 8)]),
        (32, 2, [(32, 2)]),
    ],
)
def test_calibrated_keys_have_wide_and_narrow_channels(head_dim, num_bits, segments):
    plane = key_plane_format(num_bits, head_dim, is_calibrated=True)
    assert [(segment.num_elements, segment.num_bits) for segment in plane.segments] == segments


@pytest.mark.parametrize(("num_bits", "most"), [(16, 16), (8, 8.25), (4, 4.3), (2, 2.3)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_effective_bits_stay_below_their_promise(num_bits, most, head_dim):
    assert key_plane_format(num_bits, head_dim, True).effective_bits <= most
    assert value_plane_format(num_bits, head_dim).effective_bits <= most


@pytest.mark.parametrize("head_dim", [8, 33, 72])
def test_head_dim_that_fills_no_whole_vector_is_refused(head_dim):
    with pytest.raises(ConfigError, match="multiple of 16"):
        key_plane_format(8, head_dim, False)


def test_page_is_layer_after_layer():
    wide = LayerFormat(3, key_plane_format(8, 64, False), value_plane_format(8, 64))
    narrow = LayerFormat(3, key_plane_format(4, 64, False), value_plane_format(2, 64))
    page = PageFormat((wide, narrow, wide))
    assert wide.layer_bytes == 3 * 2 * (64 * 64 + 64)
    assert narrow.layer_bytes == 3 * (64 * 32 + 64 + 64 * 16 + 64)
    assert [page.layer_offset(index) for index in range(3)] == [
        0,
        wide.layer_bytes,
        wide.layer_bytes + narrow.layer_bytes,
    ]
    assert page.page_bytes == 2 * wide.layer_bytes + narrow.layer_bytes
