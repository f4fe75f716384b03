"""Ways to store keys and values, as functions that give back what would be read: ours, others', and steps in between.

A format maps a layer's keys and values ``[G, T, D]`` to what a cache with it would give back. Those of others follow
their published arithmetic; bits count scales and zero points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from benchmarks.trellis_rows import nearest_path_levels
from kvcache.calibration import calibrated_frames, plain_frames
from kvcache.codec import decode_layer, write_exact_layer
from kvcache.config import KVCacheConfig
from kvcache.frame import LayerFrame, PlaneFrame, flat_orthonormal
from kvcache.kernels import select
from kvcache.moments import Moments
from kvcache.page import FP16_BYTES, PAGE_SIZE, PageFormat, PlaneFormat
from kvcache.scale import nearest_scale_code, scales
from kvcache.trellis import LEVEL_UNIT, level_table

Plane = Callable[[Tensor], Tensor]
"""Keys or values ``[G, T, D]`` of any layer to what is read back."""

FP16_BITS = 16


@dataclass(frozen=True)
class NamedFormat:
    """A way to store keys and values.

    Attributes:
        name: for tables.
        key_bits: stored bits per element of the keys, scales included.
        value_bits: likewise.
        quantize: layer index, keys, values to what is read back.
    """

    name: str
    key_bits: float
    value_bits: float
    quantize: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def plane_format(name: str, bits: tuple[float, float], key: Plane, value: Plane) -> NamedFormat:
    """Return a format that treats all layers alike."""
    return NamedFormat(name, *bits, lambda _, keys, values: (key(keys), value(values)))


def symmetric(num_bits: int, group_size: int) -> Plane:
    """Return plain integers with the largest element of a group of channels at the largest level."""
    largest = 2 ** (num_bits - 1) - 1

    def quantize(x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, group_size))
        scale = (groups.abs().amax(dim=-1, keepdim=True) / largest).half().float().clamp(min=1e-8)
        return ((groups / scale).round().clamp(-largest, largest) * scale).flatten(-2)

    return quantize


def ggml_q4_0(x: Tensor) -> Tensor:
    """Return 4-bit integers -8..7 in groups of 32; the element of largest size lies at -8 (llama.cpp's q4_0)."""
    groups = x.unflatten(-1, (-1, 32))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scale = (largest / -8).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    return ((groups / scale + 8.5).floor().clamp(0, 15).sub(8) * scale).flatten(-2)


def asymmetric(num_bits: int, group_size: int, is_per_channel: bool = False) -> Plane:
    """Return integers between the least and the largest of a group of channels, or of tokens of a channel."""

    def quantize(x: Tensor) -> Tensor:
        lanes = x.transpose(1, 2) if is_per_channel else x
        groups = lanes.unflatten(-1, (-1, group_size))
        least, largest = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
        scale = ((largest - least) / (2**num_bits - 1)).half().float().clamp(min=1e-8)
        levels = ((groups - least) / scale).round().clamp(0, 2**num_bits - 1)
        read = (levels * scale + least.half().float()).flatten(-2)
        return read.transpose(1, 2) if is_per_channel else read

    return quantize


def rotated(inner: Plane) -> Plane:
    """Return a format that works on rotated channels."""

    def quantize(x: Tensor) -> Tensor:
        matrix = flat_orthonormal(x.shape[-1]).float()
        return inner(x @ matrix) @ matrix.T

    return quantize


def trellis(num_bits: int, is_along_tokens: bool) -> Plane:
    """Return the trellis code with the scale of a Gaussian vector of the same length, without a search."""
    levels = level_table(num_bits)

    def quantize(x: Tensor) -> Tensor:
        scale = scales()[nearest_scale_code(x.double().square().mean(dim=-1).sqrt() * LEVEL_UNIT)].unsqueeze(-1)
        z = x / scale
        if not is_along_tokens:
            return nearest_path_levels(z, levels, num_bits) * scale
        channels = z.unflatten(1, (-1, PAGE_SIZE)).transpose(2, 3)  # [G, pages, D, 64]
        return nearest_path_levels(channels, levels, num_bits).transpose(2, 3).flatten(1, 2) * scale

    return quantize


class PagedFormat:
    """The cache's own pages, with frames and segments of choice.

    Args:
        page_format: where bytes lie in a packed page.
        frames: one a layer.
    """

    def __init__(self, page_format: PageFormat, frames: Sequence[LayerFrame]) -> None:
        self._layers = list(zip(page_format.layers, frames, strict=True))
        self._encode_page = select("encode_page")

    def __call__(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole pages and decode them; tokens behind them stay."""
        layer, frame = self._layers[layer_index]
        num_pages = key.shape[1] // PAGE_SIZE
        packed = torch.empty(num_pages, layer.layer_bytes, dtype=torch.uint8)
        exact = torch.empty(2 * key[:, :PAGE_SIZE].numel() * FP16_BYTES, dtype=torch.uint8)
        for page in range(num_pages):
            tokens = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            write_exact_layer(layer, exact, 0, key[:, tokens].transpose(0, 1), value[:, tokens].transpose(0, 1))
            self._encode_page(layer, frame, exact, packed[page])
        all_heads = replace(layer, num_kv_heads=num_pages * layer.num_kv_heads)
        read_key, read_value = decode_layer(all_heads, packed.flatten())
        return (
            _with_tail(key, _from_pages(read_key, layer.num_kv_heads), frame.key, layer.key),
            _with_tail(value, _from_pages(read_value, layer.num_kv_heads), frame.value, layer.value),
        )


def paged_format(name: str, config: KVCacheConfig, moments: Moments | None) -> NamedFormat:
    """Return the format as the cache uses it, calibrated if there are moments."""
    page_format = config.page_format(is_calibrated=moments is not None)
    frames = plain_frames(config) if moments is None else calibrated_frames(moments, config)
    return _own(name, page_format, frames)


def centred_format(name: str, config: KVCacheConfig, moments: Moments) -> NamedFormat:
    """Return pages with the plain rotation around the mean of keys and values."""
    calibrated = calibrated_frames(moments, config)
    frames = [
        LayerFrame(replace(plain.key, mean=frame.key.mean), replace(plain.value, mean=frame.value.mean))
        for plain, frame in zip(plain_frames(config), calibrated, strict=True)
    ]
    return _own(name, config.page_format(is_calibrated=False), frames)


def unsegmented_format(name: str, config: KVCacheConfig, moments: Moments) -> NamedFormat:
    """Return pages with calibrated maps and one width for all channels of a key."""
    unsegmented = _Unsegmented(**{field.name: getattr(config, field.name) for field in fields(config)})
    return paged_format(name, unsegmented, moments)


def alike_format(name: str, config: KVCacheConfig, moments: Moments) -> NamedFormat:
    """Return pages calibrated with all tokens alike, whatever attention they get."""
    return paged_format(name, config, replace(moments, attended_weight=torch.zeros_like(moments.attended_weight)))


def short_format(name: str, config: KVCacheConfig, moments: Moments) -> NamedFormat:
    """Return calibrated pages whose vectors come back as short as their codes are: the least error of single tokens."""
    frames = [
        LayerFrame(_with_inverse(frame.key), _with_inverse(frame.value)) for frame in calibrated_frames(moments, config)
    ]
    return _own(name, config.page_format(is_calibrated=True), frames)


def _with_inverse(frame: PlaneFrame) -> PlaneFrame:
    return replace(frame, decode_matrix=torch.linalg.inv(frame.encode_matrix.double()).float().contiguous())


class _Unsegmented(KVCacheConfig):
    """Settings whose calibrated keys are not cut into segments."""

    def page_format(self, is_calibrated: bool) -> PageFormat:
        """Return the format of a cache without calibration."""
        return super().page_format(is_calibrated=False)


def _own(name: str, page_format: PageFormat, frames: Sequence[LayerFrame]) -> NamedFormat:
    first = page_format.layers[0]
    bits = (first.key.effective_bits, first.value.effective_bits)
    return NamedFormat(name, *bits, PagedFormat(page_format, frames))


def _from_pages(x: Tensor, num_kv_heads: int) -> Tensor:
    """Bring ``[pages * G, 64, D]`` to ``[G, pages * 64, D]``."""
    return x.unflatten(0, (-1, num_kv_heads)).transpose(0, 1).flatten(1, 2)


def _with_tail(x: Tensor, read: Tensor, frame: PlaneFrame, plane: PlaneFormat) -> Tensor:
    decoded = read if plane.num_bits == FP16_BITS else frame.decode(read)
    return torch.cat((decoded, x[:, decoded.shape[1] :]), dim=1)
