"""Encode a page of keys and values into bytes and decode runs of pages: the specification of the format.

In: the keys and values of ``page_size`` tokens. Out: ``page_bytes`` bytes as drawn in ``page.py``, and back. A plane
that is marked rotated is rotated here on the way in and stays rotated on the way out: attention works on rotated
vectors, and rotating each key back would cost far more than rotating the query.

Every scale multiplies (``x ≈ level * scale``). Float16 scales are rounded up, so that no code has to be clipped; the
4-bit scale search may still choose to clip, where that lowers the squared error of the group.

Eight bits, one row of D channels (one token, one head):
    scale = fp16_up(max |x| / 127),  code = round(x / scale) in -127..127

Four bits, one group of g channels:
    base        = fp16_up(max |x| of the page's plane / 127)
    scale       = base * 2 ** ((scale_code - 255) / 16), the smallest that reaches max |x| of the group, or one of the
                  next five below it
    code        = index of the level next to x / scale
    byte j      = | code of channel 2j+1 | code of channel 2j |
                    bits 7..4              bits 3..0
"""

import torch
from torch import Tensor

from kvcache import codebook
from kvcache.page import FP16_BYTES, PageFormat, PlaneFormat
from kvcache.transform import rotate

# Scales tried per group: the covering one and five below (down to 0.81 of it). On Gaussian groups of 32 the search
# gains 0.74 dB, and a seventh candidate nothing more.
NUM_SCALE_CANDIDATES = 6

_LARGEST_INT8 = 127


def encode_page(page_format: PageFormat, key: Tensor, value: Tensor) -> Tensor:
    """Quantize the tokens of one page.

    Args:
        page_format: sizes and bits of both planes.
        key: ``[num_kv_heads, page_size, head_dim]`` float16 or float32, finite, not rotated.
        value: like ``key``.

    Returns:
        ``[page_bytes]`` uint8.
    """
    return torch.cat((_encode_plane(page_format.key, key), _encode_plane(page_format.value, value)))


def decode_pages(page_format: PageFormat, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantize a run of pages.

    Args:
        page_format: sizes and bits of both planes.
        pages: ``[num_pages, page_bytes]`` uint8 in the order of the sequence.

    Returns:
        Keys and values, each ``[num_kv_heads, num_pages * page_size, head_dim]`` float32; still rotated where the
        plane is.
    """
    key_plane = pages[:, : page_format.key.plane_bytes]
    value_plane = pages[:, page_format.key.plane_bytes :]
    return _decode_plane(page_format.key, key_plane), _decode_plane(page_format.value, value_plane)


def _encode_plane(plane_format: PlaneFormat, x: Tensor) -> Tensor:
    x = rotate(x.float()) if plane_format.is_rotated else x.float()
    encode = {16: _encode_16_bits, 8: _encode_8_bits, 4: _encode_4_bits}[plane_format.num_bits]
    content = encode(x, plane_format.group_size)
    return torch.nn.functional.pad(content, (0, plane_format.plane_bytes - content.numel()))


def _decode_plane(plane_format: PlaneFormat, plane: Tensor) -> Tensor:
    end_of_codes = plane_format.scale_bytes + plane_format.code_bytes
    scales = plane[:, : plane_format.scale_bytes]
    codes = plane[:, plane_format.scale_bytes : end_of_codes]
    decode = {16: _decode_16_bits, 8: _decode_8_bits, 4: _decode_4_bits}[plane_format.num_bits]
    x = decode(scales, codes, plane_format.group_size)
    x = x.reshape(-1, plane_format.num_kv_heads, plane_format.page_size, plane_format.head_dim)  # [num_pages, G, P, D]
    return x.transpose(0, 1).flatten(1, 2)


def _encode_16_bits(x: Tensor, group_size: int) -> Tensor:
    return _as_bytes(x.half())


def _decode_16_bits(scales: Tensor, codes: Tensor, group_size: int) -> Tensor:
    return codes.view(torch.float16).float()


def _encode_8_bits(x: Tensor, group_size: int) -> Tensor:
    scale = _fp16_at_least(x.abs().amax(dim=-1, keepdim=True) / _LARGEST_INT8)  # [G, P, 1]
    codes = (x / _nonzero(scale.float())).round().to(torch.int8)
    return torch.cat((_as_bytes(scale), _as_bytes(codes)))


def _decode_8_bits(scales: Tensor, codes: Tensor, group_size: int) -> Tensor:
    scale = scales.view(torch.float16).float().unsqueeze(-1)  # [num_pages, G * P, 1]
    return codes.view(torch.int8).reshape(*scale.shape[:2], -1).float() * scale


def _encode_4_bits(x: Tensor, group_size: int) -> Tensor:
    groups = x.reshape(-1, group_size)  # [num_groups, g]
    base = _fp16_at_least(groups.abs().amax().reshape(1) / codebook.LARGEST_LEVEL)
    scales = base.float() * codebook.scale_steps()  # [256], ascending
    scale_codes = _search_scale_codes(groups, scales)  # [num_groups]
    codes = _nearest_codes(groups, scales[scale_codes]).reshape(-1, 2)
    pairs = codes[:, 0] + codebook.NUM_LEVELS * codes[:, 1]
    return torch.cat((_as_bytes(base), scale_codes.to(torch.uint8), pairs.to(torch.uint8)))


def _decode_4_bits(scales: Tensor, codes: Tensor, group_size: int) -> Tensor:
    base = scales[:, :FP16_BYTES].view(torch.float16).float()  # [num_pages, 1]
    scale = base * codebook.scale_steps()[scales[:, FP16_BYTES:].int()]  # [num_pages, num_groups]
    # As an embedding lookup, which is over three times as fast as indexing with the same bytes.
    level = torch.nn.functional.embedding(codes.int(), codebook.level_pairs())  # [num_pages, code_bytes, 2]
    return level.reshape(len(codes), -1, group_size) * scale.unsqueeze(-1)  # [num_pages, num_groups, g]


def _search_scale_codes(groups: Tensor, scales: Tensor) -> Tensor:
    """Choose for each group ``[num_groups, g]`` the scale code of least squared error; ties go to the larger scale."""
    largest = groups.abs().amax(dim=-1)  # [num_groups]
    covering = torch.searchsorted(scales * codebook.LARGEST_LEVEL, largest).clamp_(max=len(scales) - 1)
    best_codes = covering
    best_error = _squared_error(groups, scales[covering])
    for num_steps in range(1, NUM_SCALE_CANDIDATES):
        candidate = (covering - num_steps).clamp_(min=0)
        error = _squared_error(groups, scales[candidate])
        best_codes = torch.where(error < best_error, candidate, best_codes)
        best_error = torch.minimum(error, best_error)
    return best_codes


def _squared_error(groups: Tensor, scale: Tensor) -> Tensor:
    approximation = codebook.levels()[_nearest_codes(groups, scale)] * scale.unsqueeze(-1)
    return (groups - approximation).square().sum(dim=-1)


def _nearest_codes(groups: Tensor, scale: Tensor) -> Tensor:
    return torch.bucketize(groups / _nonzero(scale).unsqueeze(-1), codebook.level_boundaries())


def _nonzero(scale: Tensor) -> Tensor:
    """Replace a zero scale, which only all-zero data has, by one: dividing by it then yields zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _fp16_at_least(x: Tensor) -> Tensor:
    """Round non-negative float32 up to float16."""
    rounded = x.half()
    next_above = (rounded.view(torch.int16) + 1).view(torch.float16)  # non-negative floats are ordered like integers
    return torch.where(rounded.float() < x, next_above, rounded)


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
