"""The encoder in Triton's interpreter writes the bytes of the reference; run by ``test_triton_interpreted.py``."""

import pytest
import torch
from page_factories import exact_page, layer_format, plain_layer_frame, random_tokens, skewed_layer_frame

from kvcache.codec import encode_layer
from kvcache.kernels.triton.operations import encode_page
from kvcache.page import PAGE_SIZE
from moe_bitnet.errors import ShapeError

# seconds for every 16 channels and head in the interpreter: small sizes are fast, the others slow
CASES = [
    (2, 32, 8, 8, False),
    (1, 64, 4, 2, True),
    (2, 16, 16, 8, False),
    (1, 16, 8, 16, False),
    pytest.param(1, 16, 2, 4, False, marks=pytest.mark.slow),
    *(
        pytest.param(num_kv_heads, head_dim, bits, bits, True, marks=pytest.mark.slow)
        for num_kv_heads, head_dim in ((2, 64), (1, 80), (1, 128))
        for bits in (4, 2)
    ),
]


def assert_bytes_equal(layer, frame, page):
    packed = torch.full((layer.layer_bytes,), 0xA5, dtype=torch.uint8)
    encode_page(layer, frame, page, packed)
    assert torch.equal(packed, encode_layer(layer, frame, page))


@pytest.mark.parametrize(("num_kv_heads", "head_dim", "key_bits", "value_bits", "is_calibrated"), CASES)
def test_every_width_equals_the_reference(num_kv_heads, head_dim, key_bits, value_bits, is_calibrated):
    layer = layer_format(num_kv_heads, head_dim, key_bits, value_bits, is_calibrated)
    frame = skewed_layer_frame(layer) if is_calibrated else plain_layer_frame(layer)
    assert_bytes_equal(layer, frame, exact_page(layer, *random_tokens(layer, PAGE_SIZE)))


@pytest.mark.parametrize("num_bits", [8, 4])
def test_tokens_of_any_size_equal_the_reference(num_bits):
    layer = layer_format(1, 16, num_bits, num_bits)
    key, value = random_tokens(layer, PAGE_SIZE)
    factors = torch.exp2(torch.linspace(-14, 14, PAGE_SIZE)).reshape(-1, 1, 1)
    key, value = (key * factors).clamp(-60000, 60000), (value * factors).clamp(-60000, 60000)
    key[5], value[7] = 0, 0
    assert_bytes_equal(layer, plain_layer_frame(layer), exact_page(layer, key, value))


def test_what_does_not_fit_is_refused():
    layer = layer_format(1, 16, 4, 4)
    frame, page = plain_layer_frame(layer), exact_page(layer, *random_tokens(layer, PAGE_SIZE))
    packed = torch.zeros(layer.layer_bytes, dtype=torch.uint8)
    for name, exact, written in (("exact", page[1:], packed), ("packed", page, packed[:-64])):
        with pytest.raises(ShapeError, match=f"encode_page: {name} is"):
            encode_page(layer, frame, exact, written)
