"""Encode one layer's part of a page and decode it: the specification of the format.

In: the float16 planes of an exact page. Out: ``layer_bytes`` bytes as drawn in ``page.py``, and back. Every backend
gives the same bytes: sums that could be ordered differently are float64 and rounded once, all else is float32 in the
order written here.

A scale multiplies (``y ≈ level * scale``) and belongs to one token of one head:
    8 bits       the smallest scale that reaches the largest channel; levels are rounded
    4, 2 bits    the scale of a Gaussian vector of the same length, or one of ``SCALE_STEPS`` from it: for keys the one
                 whose weighted error is least, for values (whose streams run across tokens) likewise with every token
                 shifted by the same number of steps; then the trellis finds the codes
"""

import torch
from torch import Tensor

from kvcache.frame import LayerFrame, PlaneFrame
from kvcache.page import FP16_BYTES, LANES, PAGE_SIZE, WORD_BITS, LayerFormat, PlaneFormat, Segment
from kvcache.scale import NUM_SCALES, covering_scale_code, nearest_scale_code, scales
from kvcache.trellis import LARGEST_LEVEL, LEVEL_UNIT, decode_rows, encode_rows

# Sixteenths of an octave from the Gaussian scale, in the order of trial. On real keys at 4 bits the search halves the
# divergence; more steps gain nothing (docs/experiments.md).
SCALE_STEPS = (0, -4, -2, 2, 4, 6)


def encode_layer(layer_format: LayerFormat, frame: LayerFrame, exact: Tensor) -> Tensor:
    """Quantize one layer of a page.

    Args:
        layer_format: sizes and bits.
        frame: the maps of the layer.
        exact: uint8 ``[exact layer bytes]``: float16 planes, finite.

    Returns:
        uint8 ``[layer_bytes]``.
    """
    key, value = read_exact_layer(layer_format, exact)
    key_planes = _encode_keys(layer_format.key, frame.key, key)
    value_planes = _encode_values(layer_format.value, frame.value, value)
    return torch.cat((key_planes, value_planes), dim=1).flatten()


def decode_layer(layer_format: LayerFormat, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantize one layer of a page, still in the coordinates of its frame.

    Args:
        layer_format: sizes and bits.
        packed: uint8 ``[layer_bytes]``.

    Returns:
        Keys and values, float32 ``[num_kv_heads, 64, head_dim]``; planes of 16 bits have no frame and are as they were.
    """
    heads = packed.reshape(layer_format.num_kv_heads, layer_format.head_bytes)
    key_planes, value_planes = torch.split(heads, [layer_format.key.plane_bytes, layer_format.value.plane_bytes], dim=1)
    return decode_keys(layer_format.key, key_planes), decode_values(layer_format.value, value_planes)


def decode_keys(plane_format: PlaneFormat, planes: Tensor) -> Tensor:
    """Dequantize key planes uint8 ``[num_kv_heads, plane_bytes]`` to float32 ``[num_kv_heads, 64, head_dim]``."""
    if plane_format.num_bits == 16:
        return _as_fp16(planes, plane_format.head_dim, PAGE_SIZE).transpose(1, 2).float()
    return key_levels(plane_format, planes) * plane_scales(plane_format, planes).unsqueeze(2)


def decode_values(plane_format: PlaneFormat, planes: Tensor) -> Tensor:
    """Dequantize value planes uint8 ``[num_kv_heads, plane_bytes]`` to float32 ``[num_kv_heads, 64, head_dim]``."""
    if plane_format.num_bits == 16:
        return _as_fp16(planes, PAGE_SIZE, plane_format.head_dim).float()
    return value_levels(plane_format, planes) * plane_scales(plane_format, planes).unsqueeze(2)


def key_levels(plane_format: PlaneFormat, planes: Tensor) -> Tensor:
    """Look up the levels of key planes; float32 integers ``[num_kv_heads, 64, head_dim]``."""
    words = _read_words(plane_format, planes, PAGE_SIZE // LANES)  # [G, 64 tokens, words]
    return _decode_streams(words, plane_format.segments)


def value_levels(plane_format: PlaneFormat, planes: Tensor) -> Tensor:
    """Look up the levels of value planes; float32 integers ``[num_kv_heads, 64, head_dim]``."""
    words = _read_words(plane_format, planes, plane_format.head_dim // LANES)  # [G, D channels, words]
    return _decode_streams(words, plane_format.segments).transpose(1, 2)


def plane_scales(plane_format: PlaneFormat, planes: Tensor) -> Tensor:
    """Read the scales of planes; float32 ``[num_kv_heads, 64]``."""
    return scales()[planes[:, plane_format.code_bytes :].long()]


def read_exact_layer(layer_format: LayerFormat, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Read the keys and values of one layer of an exact page.

    Args:
        layer_format: sizes; the bits play no part.
        exact: uint8 ``[exact layer bytes]``.

    Returns:
        Keys and values, float32 ``[num_kv_heads, 64, head_dim]``.
    """
    head_dim = layer_format.head_dim
    planes = exact.reshape(layer_format.num_kv_heads, 2, PAGE_SIZE * head_dim * FP16_BYTES)
    key = _as_fp16(planes[:, 0], head_dim, PAGE_SIZE).transpose(1, 2)
    return key.float(), _as_fp16(planes[:, 1], PAGE_SIZE, head_dim).float()


def write_exact_layer(layer_format: LayerFormat, exact: Tensor, first_slot: int, key: Tensor, value: Tensor) -> None:
    """Put tokens into one layer of an exact page.

    Args:
        layer_format: sizes; the bits play no part.
        exact: uint8 ``[exact layer bytes]``, contiguous, changed in place.
        first_slot: where in the page the first of them goes.
        key: ``[num_tokens, num_kv_heads, head_dim]`` floats; they are rounded to float16.
        value: like ``key``.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    planes = exact.view(torch.float16).view(num_kv_heads, 2, PAGE_SIZE * head_dim)
    slots = slice(first_slot, first_slot + num_tokens)
    planes[:, 0].view(num_kv_heads, head_dim, PAGE_SIZE)[:, :, slots] = key.permute(1, 2, 0)
    planes[:, 1].view(num_kv_heads, PAGE_SIZE, head_dim)[:, slots] = value.transpose(0, 1)


def _encode_keys(plane_format: PlaneFormat, frame: PlaneFrame, x: Tensor) -> Tensor:
    """Return uint8 ``[num_kv_heads, plane_bytes]`` of float32 ``[num_kv_heads, 64, head_dim]``."""
    if plane_format.num_bits == 16:
        return x.transpose(1, 2).half().flatten(1).view(torch.uint8)
    y = frame.encode(x)
    if _is_plain(plane_format):
        scale_codes = covering_scale_code(y.abs().amax(dim=2), LARGEST_LEVEL)
    else:
        trials = _trial_codes(y)
        errors = [_key_error(y, codes, plane_format.segments, frame.segment_weights) for codes in trials]
        scale_codes = _first_best(trials, errors)
    rows = [_encode_rows(part, segment.num_bits)[0] for part, segment in _cut(_scaled(y, scale_codes), plane_format)]
    return torch.cat((_write_words(rows, plane_format.segments), scale_codes.to(torch.uint8)), dim=1)


def _encode_values(plane_format: PlaneFormat, frame: PlaneFrame, x: Tensor) -> Tensor:
    """Return uint8 ``[num_kv_heads, plane_bytes]`` of float32 ``[num_kv_heads, 64, head_dim]``."""
    if plane_format.num_bits == 16:
        return x.half().flatten(1).view(torch.uint8)
    y = frame.encode(x)
    if _is_plain(plane_format):
        scale_codes = covering_scale_code(y.abs().amax(dim=2), LARGEST_LEVEL)
    else:
        trials = _trial_codes(y)
        errors = [_value_error(y, codes, plane_format.num_bits) for codes in trials]
        scale_codes = _first_best(trials, errors)
    channels = _scaled(y, scale_codes).transpose(1, 2)  # [G, D, 64]
    rows = [_encode_rows(channels, plane_format.num_bits)[0]]
    return torch.cat((_write_words(rows, plane_format.segments), scale_codes.to(torch.uint8)), dim=1)


def _is_plain(plane_format: PlaneFormat) -> bool:
    return all(segment.num_bits == 8 for segment in plane_format.segments)


def _trial_codes(y: Tensor) -> list[Tensor]:
    """Return the scale codes to try for every token: int64 ``[G, 64]`` each, the Gaussian one first."""
    root_mean_square = y.double().square().mean(dim=2).sqrt()
    gaussian = nearest_scale_code(root_mean_square * LEVEL_UNIT)
    return [(gaussian + step).clamp(0, NUM_SCALES - 1) for step in SCALE_STEPS]


def _scaled(y: Tensor, scale_codes: Tensor) -> Tensor:
    return y / scales()[scale_codes].unsqueeze(2)


def _cut(y: Tensor, plane_format: PlaneFormat) -> list[tuple[Tensor, Segment]]:
    sizes = [segment.num_elements for segment in plane_format.segments]
    return list(zip(torch.split(y, sizes, dim=2), plane_format.segments, strict=True))


def _key_error(y: Tensor, scale_codes: Tensor, segments: tuple[Segment, ...], weights: Tensor) -> Tensor:
    """Return the weighted squared error of every token, float32 ``[G, 64]``."""
    error = torch.zeros(y.shape[:2])
    start = 0
    z = _scaled(y, scale_codes)
    for index, segment in enumerate(segments):
        _, _, squared_error = _encode_rows(z[:, :, start : start + segment.num_elements], segment.num_bits)
        error = error + weights[:, index, None] * squared_error
        start += segment.num_elements
    scale = scales()[scale_codes]
    return error * (scale * scale)


def _value_error(y: Tensor, scale_codes: Tensor, num_bits: int) -> Tensor:
    """Return the squared error of every token, float32 ``[G, 64]``, summed over channels in ascending order."""
    z = _scaled(y, scale_codes)
    _, levels, _ = _encode_rows(z.transpose(1, 2), num_bits)
    distance = z - levels.transpose(1, 2)
    error = torch.zeros(y.shape[:2])
    for channel in range(y.shape[2]):
        error = error + distance[:, :, channel] * distance[:, :, channel]
    scale = scales()[scale_codes]
    return error * (scale * scale)


def _first_best(trials: list[Tensor], errors: list[Tensor]) -> Tensor:
    """Take for every token the trial of least error; the earliest one among equals."""
    best, best_error = trials[0], errors[0]
    for trial, error in zip(trials[1:], errors[1:], strict=True):
        best = torch.where(error < best_error, trial, best)
        best_error = torch.minimum(error, best_error)
    return best


def _encode_rows(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode ``[G, rows, elements]``: codes uint8 and levels of the same shape, squared error ``[G, rows]``."""
    if num_bits == 8:
        levels = x.round().clamp(-LARGEST_LEVEL, LARGEST_LEVEL)
        distance = x - levels
        squared_error = torch.zeros(x.shape[:2])
        for element in reversed(range(x.shape[2])):
            squared_error = squared_error + distance[:, :, element] * distance[:, :, element]
        return levels.to(torch.int8).view(torch.uint8), levels, squared_error
    encoded = encode_rows(x.flatten(0, 1), num_bits)
    codes, levels = (part.reshape(x.shape) for part in (encoded.codes, encoded.levels))
    return codes, levels, encoded.squared_error.reshape(x.shape[:2])


def _write_words(rows: list[Tensor], segments: tuple[Segment, ...]) -> Tensor:
    """Pack codes ``[G, rows, elements]`` of every segment into uint8 ``[G, code_bytes]``, lanes together."""
    stream = torch.cat(
        [_join_bits(codes, segment.num_bits) for codes, segment in zip(rows, segments, strict=True)], dim=2
    )  # [G, rows, bytes of a lane]
    num_kv_heads, num_rows, _ = stream.shape
    words = stream.contiguous().view(torch.int32).view(num_kv_heads, num_rows // LANES, LANES, -1)
    return words.transpose(2, 3).contiguous().flatten(1).view(torch.uint8)


def _join_bits(codes: Tensor, num_bits: int) -> Tensor:
    """Put codes ``[..., elements]`` into bytes, the first one into the lowest bits."""
    shifts = torch.arange(0, 8, num_bits)
    return (codes.long().reshape(*codes.shape[:-1], -1, len(shifts)) << shifts).sum(dim=-1).to(torch.uint8)


def _read_words(plane_format: PlaneFormat, planes: Tensor, num_tiles: int) -> Tensor:
    """Return the streams of all lanes: uint8 ``[G, 16 * num_tiles, bytes of a lane]``."""
    codes = planes[:, : plane_format.code_bytes].contiguous().view(torch.int32)
    words = codes.view(len(planes), num_tiles, -1, LANES).transpose(2, 3).flatten().contiguous()
    return words.view(torch.uint8).view(len(planes), num_tiles * LANES, -1)


def _decode_streams(streams: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """Return the levels of uint8 ``[G, rows, bytes of a lane]``: float32 ``[G, rows, elements]``."""
    parts = torch.split(streams, [segment.num_words * WORD_BITS // 8 for segment in segments], dim=2)
    return torch.cat(
        [_segment_levels(part, segment.num_bits) for part, segment in zip(parts, segments, strict=True)], dim=2
    )


def _segment_levels(part: Tensor, num_bits: int) -> Tensor:
    if num_bits == 8:
        return part.view(torch.int8).float()
    codes = (part.unsqueeze(-1) >> torch.arange(0, 8, num_bits)) & ((1 << num_bits) - 1)
    codes = codes.flatten(2)  # [G, rows, elements]
    return decode_rows(codes.flatten(0, 1), num_bits).reshape(codes.shape)


def _as_fp16(planes: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return planes.contiguous().view(torch.float16).view(len(planes), num_rows, num_columns)
