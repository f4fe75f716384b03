"""Pages of random tokens, for the tests of the codec and of every backend."""

import torch

from kvcache import KVCacheConfig
from kvcache.codec import write_exact_layer
from kvcache.frame import LayerFrame, PlaneFrame, plain_frame
from kvcache.page import LayerFormat

WIDTHS = ((16, 16), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (16, 4), (2, 16))


def layer_format(num_kv_heads, head_dim, key_bits, value_bits, is_calibrated=False) -> LayerFormat:
    config = KVCacheConfig(1, num_kv_heads, head_dim, key_bits, value_bits)
    return config.page_format(is_calibrated).layers[0]


def plain_layer_frame(layer: LayerFormat) -> LayerFrame:
    frame = plain_frame(layer.num_kv_heads, layer.head_dim)
    weights = torch.ones(layer.num_kv_heads, max(1, len(layer.key.segments)))
    return LayerFrame(PlaneFrame(frame.mean, frame.encode_matrix, frame.decode_matrix, weights), frame)


def skewed_layer_frame(layer: LayerFormat, seed=0) -> LayerFrame:
    """Maps such as calibration makes: neither orthonormal nor centred, another one for every head."""
    generator = torch.Generator().manual_seed(seed)

    def plane(num_segments):
        sizes = (layer.num_kv_heads, layer.head_dim)
        plain = plain_frame(*sizes)
        stretch = torch.empty(sizes, dtype=torch.float64).uniform_(0.5, 2.0, generator=generator)
        encode = plain.encode_matrix.double() * stretch.unsqueeze(1)
        weights = torch.empty(layer.num_kv_heads, num_segments).uniform_(0.05, 1.0, generator=generator)
        mean = torch.randn(sizes, generator=generator) / 2
        return PlaneFrame(mean, encode.float(), torch.linalg.inv(encode).float().contiguous(), weights)

    return LayerFrame(plane(max(1, len(layer.key.segments))), plane(1))


def random_tokens(layer: LayerFormat, num_tokens, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[num_tokens, num_kv_heads, head_dim]`` with some large channels, as models have."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, layer.num_kv_heads, layer.head_dim)
    key, value = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    key[:, :, ::13] *= 4
    return key.half().float(), value.half().float()


def exact_page(layer: LayerFormat, key, value) -> torch.Tensor:
    page = torch.zeros(layer.exact_layer_bytes, dtype=torch.uint8)
    write_exact_layer(layer, page, 0, key, value)
    return page
