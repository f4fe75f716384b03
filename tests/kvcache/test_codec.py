import pytest
import torch
from page_factories import WIDTHS, exact_page, layer_format, plain_layer_frame, random_tokens, skewed_layer_frame

from kvcache import codec
from kvcache.page import PAGE_SIZE
from kvcache.scale import scales
from kvcache.trellis import decode_rows, level_table


def decoded(layer, frame, key, value):
    """Keys and values [64, G, D] after a round trip through a packed page."""
    packed = codec.encode_layer(layer, frame, exact_page(layer, key, value))
    key_y, value_y = codec.decode_layer(layer, packed)
    if layer.key.num_bits < 16:
        key_y = frame.key.decode(key_y)
    if layer.value.num_bits < 16:
        value_y = frame.value.decode(value_y)
    return key_y.transpose(0, 1), value_y.transpose(0, 1)


def signal_to_noise_db(x, approximation):
    return -10 * ((x - approximation).square().mean() / x.square().mean()).log10()


@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("make_frame", [plain_layer_frame, skewed_layer_frame])
def test_page_has_its_size_and_is_deterministic(key_bits, value_bits, head_dim, make_frame):
    layer = layer_format(2, head_dim, key_bits, value_bits, is_calibrated=True)
    page = exact_page(layer, *random_tokens(layer, PAGE_SIZE))
    packed = codec.encode_layer(layer, make_frame(layer), page)
    assert packed.dtype == torch.uint8
    assert packed.shape == (layer.layer_bytes,)
    assert torch.equal(packed, codec.encode_layer(layer, make_frame(layer), page))


# A plain rotation on Gaussian data with a few large channels; the trellis reaches 21.6 and 10.7 dB, int8 about 44.
@pytest.mark.parametrize(("num_bits", "least_db"), [(8, 42), (4, 21.0), (2, 10.0)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_round_trip_keeps_the_signal(num_bits, least_db, head_dim):
    layer = layer_format(2, head_dim, num_bits, num_bits)
    key, value = random_tokens(layer, PAGE_SIZE)
    key_back, value_back = decoded(layer, plain_layer_frame(layer), key, value)
    assert signal_to_noise_db(key, key_back) > least_db
    assert signal_to_noise_db(value, value_back) > least_db


def test_sixteen_bits_lose_nothing():
    layer = layer_format(2, 64, 16, 16)
    key, value = random_tokens(layer, PAGE_SIZE)
    key_back, value_back = decoded(layer, plain_layer_frame(layer), key, value)
    assert torch.equal(key, key_back)
    assert torch.equal(value, value_back)


def test_exact_page_gives_back_what_was_written_slot_by_slot():
    layer = layer_format(3, 32, 8, 8)
    key, value = random_tokens(layer, PAGE_SIZE)
    page = exact_page(layer, key[:10], value[:10])
    codec.write_exact_layer(layer, page, 10, key[10:], value[10:])
    key_back, value_back = codec.read_exact_layer(layer, page)
    assert torch.equal(key_back.transpose(0, 1), key)
    assert torch.equal(value_back.transpose(0, 1), value)


def test_bytes_of_a_key_are_where_the_drawing_says():
    """Token 37 is lane 5 of tile 2; its stream's words lie 16 words apart."""
    layer = layer_format(2, 64, 4, 8)
    packed = codec.encode_layer(layer, plain_layer_frame(layer), exact_page(layer, *random_tokens(layer, PAGE_SIZE)))
    plane = packed[layer.head_bytes : layer.head_bytes + layer.key.plane_bytes]  # head 1
    num_words = 64 * 4 // 32
    words = plane[: layer.key.code_bytes].view(torch.int32).view(4, num_words, 16)[2, :, 5]
    stream = words.contiguous().view(torch.uint8).long()
    codes = torch.stack((stream & 15, stream >> 4), dim=1).flatten()
    y = decode_rows(codes[None].to(torch.uint8), 4)[0] * scales()[plane[layer.key.code_bytes + 37].long()]
    assert torch.equal(y, codec.decode_layer(layer, packed)[0][1, 37])


def test_bytes_of_a_value_are_where_the_drawing_says():
    """Channel 19 is lane 3 of tile 1; its stream runs along the 64 tokens."""
    layer = layer_format(2, 32, 8, 2)
    packed = codec.encode_layer(layer, plain_layer_frame(layer), exact_page(layer, *random_tokens(layer, PAGE_SIZE)))
    plane = packed[layer.key.plane_bytes : layer.head_bytes]  # head 0
    words = plane[: layer.value.code_bytes].view(torch.int32).view(2, 4, 16)[1, :, 3]
    stream = words.contiguous().view(torch.uint8).long()
    bits = ((stream[:, None] >> torch.arange(8)) & 1).flatten()
    bits = torch.cat((bits, torch.zeros(6, dtype=torch.int64)))
    window = sum(bits[2 * token + shift] << shift for token in [41] for shift in range(6))
    expected = level_table(2)[window] * scales()[plane[layer.value.code_bytes + 41].long()]
    assert codec.decode_layer(layer, packed)[1][0, 41, 19] == expected


@pytest.mark.parametrize("num_bits", [8, 4, 2])
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 1e-7, 1e-2, 30.0, 60000.0])
def test_any_magnitude_gives_finite_numbers(num_bits, is_calibrated, magnitude):
    layer = layer_format(1, 32, num_bits, num_bits, is_calibrated)
    key, value = random_tokens(layer, PAGE_SIZE)
    frame = plain_layer_frame(layer)
    key, value = (magnitude * x / x.abs().max() for x in (key, value))
    for back, x in zip(decoded(layer, frame, key, value), (key, value), strict=True):
        assert back.isfinite().all()
        # no larger than the data, but for a code's smallest scale
        assert back.abs().max() <= 2 * x.abs().max() + 32 * 127 * scales()[0]


def test_one_token_does_not_change_the_scale_of_another():
    layer = layer_format(1, 64, 4, 8)
    key, value = random_tokens(layer, PAGE_SIZE)
    loud = key.clone()
    loud[7] *= 100
    frame = plain_layer_frame(layer)
    quiet_back, loud_back = decoded(layer, frame, key, value)[0], decoded(layer, frame, loud, value)[0]
    others = [token for token in range(PAGE_SIZE) if token != 7]
    assert torch.equal(quiet_back[others], loud_back[others])


def test_scale_search_lowers_the_error():
    layer = layer_format(2, 64, 4, 4)
    y = random_tokens(layer, PAGE_SIZE)[0].transpose(0, 1)
    trials = codec._trial_codes(y)
    weights = torch.ones(2, 1)
    errors = [codec._key_error(y, codes, layer.key.segments, weights) for codes in trials]
    best = codec._key_error(y, codec._first_best(trials, errors), layer.key.segments, weights)
    assert torch.equal(best, torch.stack(errors).amin(dim=0))
    assert best.mean() < 0.95 * errors[0].mean()
