import pytest

from kvcache.page import PageFormat, PlaneFormat


def plane(num_bits, **change):
    sizes = {"num_kv_heads": 3, "page_size": 5, "head_dim": 8, "group_size": 4, "is_rotated": False}
    return PlaneFormat(num_bits=num_bits, **{**sizes, **change})


@pytest.mark.parametrize(
    ("num_bits", "scale_bytes", "code_bytes"), [(16, 0, 240), (8, 2 * 15, 120), (4, 2 + 15 * 2, 60)]
)
def test_plane_is_scales_then_codes(num_bits, scale_bytes, code_bytes):
    assert plane(num_bits).scale_bytes == scale_bytes
    assert plane(num_bits).code_bytes == code_bytes
    assert plane(num_bits).plane_bytes == scale_bytes + code_bytes


@pytest.mark.parametrize(
    ("odd_plane", "num_bytes"), [(plane(8, head_dim=7), 30 + 105), (plane(4, group_size=8), 2 + 15 + 60)]
)
def test_odd_plane_is_padded_by_one_byte(odd_plane, num_bytes):
    assert odd_plane.plane_bytes == num_bytes + 1


def test_effective_bits_count_every_byte():
    assert plane(4, group_size=8).effective_bits == 8 * 78 / 120


def test_page_is_both_planes():
    assert PageFormat(key=plane(8), value=plane(4)).page_bytes == 150 + 92
