import dataclasses
import itertools

import pytest
import torch
from moment_factories import NUM_TOKENS, moments_of, skewed_tokens
from page_factories import exact_page

from kvcache import KVCacheConfig
from kvcache.calibration import calibrated_frames, plain_frames
from kvcache.codec import decode_keys, decode_layer, encode_layer
from kvcache.moments import Moments
from kvcache.page import PAGE_SIZE
from kvcache.trellis import KEPT_SHARE
from moe_bitnet.errors import ConfigError

CONFIG = KVCacheConfig(num_layers=2, num_kv_heads=2, head_dim=64, key_bits=4, value_bits=4)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (4, 2), (16, 16)])
@pytest.mark.parametrize("is_calibrated", [True, False])
def test_maps_are_inverse_but_for_what_codes_keep(bits, is_calibrated):
    config = dataclasses.replace(CONFIG, key_bits=bits[0], value_bits=bits[1])
    frames = calibrated_frames(moments_of(*skewed_tokens()), config) if is_calibrated else plain_frames(config)
    page_format = config.page_format(is_calibrated)
    for frame, layer in zip(frames, page_format.layers, strict=True):
        key_shares = channel_shares(layer.key) if is_calibrated else torch.ones(64).double()
        for plane, shares in ((frame.key, key_shares), (frame.value, channel_shares(layer.value))):
            product = plane.decode_matrix.double() @ plane.encode_matrix.double()
            torch.testing.assert_close(product, torch.diag(1 / shares).expand(2, 64, 64), rtol=0, atol=2e-4)
        assert frame.key.segment_weights.shape == (2, max(1, len(layer.key.segments)) if is_calibrated else 1)


def channel_shares(plane_format):
    """What the codes of each channel keep; a value's only segment counts tokens, as many as channels here."""
    shares = [[KEPT_SHARE[segment.num_bits]] * segment.num_elements for segment in plane_format.segments]
    return torch.tensor(list(itertools.chain(*shares)) or [1.0] * 64, dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("is_calibrated", [True, False])
def test_what_is_read_is_on_average_what_was_written(bits, is_calibrated):
    """Regression of what is read on what was written, in the channels that are coded: 1, not the share kept.

    Keys around zero stay as short as their codes: what is short of their mean shifts all scores alike.
    """
    config = dataclasses.replace(CONFIG, key_bits=bits, value_bits=bits)
    moments = moments_of(*skewed_tokens())
    frame = (calibrated_frames(moments, config) if is_calibrated else plain_frames(config))[0]
    layer = config.page_format(is_calibrated).layers[0]
    _, key, value = skewed_tokens(seed=1)
    pages = range(0, 3 * PAGE_SIZE, PAGE_SIZE)
    packed = [
        encode_layer(layer, frame, exact_page(layer, *(x[p : p + PAGE_SIZE] for x in (key, value)))) for p in pages
    ]
    read = [decode_layer(layer, page) for page in packed]
    slopes = []
    for plane, x, levels in zip((frame.key, frame.value), (key, value), zip(*read, strict=True), strict=True):
        written = plane.encode(x[: 3 * PAGE_SIZE].half().float().transpose(0, 1)).double()
        lengthened = (plane.decode(torch.cat(levels, dim=1)) - plane.mean.unsqueeze(1)).double()
        slopes.append(float((written * (lengthened @ plane.encode_matrix.double())).sum() / written.square().sum()))
    assert slopes == pytest.approx([1 if is_calibrated else KEPT_SHARE[bits], 1], abs=0.02)


def test_mapped_keys_have_unit_variance_and_no_mean():
    query, key, value = skewed_tokens()
    frame = calibrated_frames(moments_of(query, key, value), dataclasses.replace(CONFIG, key_bits=8))[0]
    y = frame.key.encode(key.transpose(0, 1))
    assert y.mean(dim=1).abs().max() < 1e-3
    torch.testing.assert_close(y.square().mean(dim=(1, 2)), torch.ones(2), rtol=0.1, atol=0)


@pytest.mark.parametrize(("num_bits", "gain_db"), [(4, 5), (2, 5)])
def test_scores_err_less_than_with_a_plain_rotation(num_bits, gain_db):
    config = dataclasses.replace(CONFIG, key_bits=num_bits)
    calibrated = calibrated_frames(moments_of(*skewed_tokens(seed=0)), config)[0]
    plain = plain_frames(config)[0]
    query, key, value = skewed_tokens(seed=1)
    errors_db = []
    for frame, is_calibrated in ((plain, False), (calibrated, True)):
        layer = config.page_format(is_calibrated).layers[0]
        packed = encode_layer(layer, frame, exact_page(layer, key[:PAGE_SIZE], value[:PAGE_SIZE]))
        y = decode_keys(layer.key, packed.view(2, -1)[:, : layer.key.plane_bytes])
        difference = frame.key.decode(y) - key[:PAGE_SIZE].half().float().transpose(0, 1)
        difference = difference - difference.mean(dim=1, keepdim=True)  # softmax does not see a common shift
        scores = query.unflatten(1, (2, 3)).permute(1, 2, 0, 3).flatten(1, 2) @ difference.transpose(1, 2)
        errors_db.append(10 * scores.square().mean().log10())
    assert errors_db[0] - errors_db[1] > gain_db


def test_moments_of_another_model_are_refused():
    moments = moments_of(*skewed_tokens())
    with pytest.raises(ConfigError, match="Calibrate this model"):
        calibrated_frames(moments, dataclasses.replace(CONFIG, num_layers=3))
    with pytest.raises(ConfigError, match="saw 0 tokens"):
        calibrated_frames(Moments.zeros(2, 2, 64), CONFIG)


def test_tokens_that_are_attended_to_are_kept_better():
    """One token in sixteen gets the attention of all others and has values of its own."""
    generator = torch.Generator().manual_seed(0)
    query, value = torch.zeros(NUM_TOKENS, 2, 64), torch.randn(NUM_TOKENS, 2, 64, generator=generator)
    key = torch.zeros(NUM_TOKENS, 2, 64)
    query[..., 0] = 8.0
    key[::16, :, 0] = 8.0
    value[::16] = value[::16] / 8 + 1
    plain, attended = moments_of(query, key, value), moments_of(query, key, value)
    for layer_index in range(2):
        attended.add_attended(layer_index, query, key, value, 0.125)
    config = dataclasses.replace(CONFIG, value_bits=2)
    layer = config.page_format(is_calibrated=True).layers[0]
    errors = []
    for moments in (plain, attended):
        frame = calibrated_frames(moments, config)[0]
        packed = encode_layer(layer, frame, exact_page(layer, key[:PAGE_SIZE], value[:PAGE_SIZE]))
        read = frame.value.decode(decode_layer(layer, packed)[1])[:, ::16]
        errors.append((read - value[:PAGE_SIZE:16].transpose(0, 1)).square().mean())
    assert errors[1] < 0.7 * errors[0]
