import dataclasses

import pytest

from kvcache import KVCacheConfig
from moe_bitnet.errors import ConfigError

# The attention of a small real model: 30 layers, 3 KV heads of 64 channels.
SMALL_MODEL = KVCacheConfig(num_layers=30, num_kv_heads=3, head_dim=64)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL_MODEL.key_bits = 4


def test_fp16_bytes_per_token_counts_keys_and_values_of_all_layers():
    assert SMALL_MODEL.fp16_bytes_per_token == 23_040
    assert SMALL_MODEL.recent_bytes == (32 + 64 + 63) * 23_040


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "page_bytes"),
    [
        (16, 16, 2 * (64 * 3 * 64 * 2)),
        (8, 8, 2 * (64 * 3 * (64 + 2))),
        (4, 4, 2 * (64 * 3 * (32 + 2) + 2)),
        (8, 4, 64 * 3 * (64 + 2) + 64 * 3 * (32 + 2) + 2),
    ],
)
def test_page_bytes_count_codes_and_scales(key_bits, value_bits, page_bytes):
    config = dataclasses.replace(SMALL_MODEL, key_bits=key_bits, value_bits=value_bits)
    assert config.page_bytes == page_bytes
    assert config.effective_bits == 8 * page_bytes / (2 * 64 * 3 * 64)


@pytest.mark.parametrize(("bits", "most"), [(16, 16), (8, 8 + 16 / 64), (4, 4.26)])
def test_effective_bits_stay_below_their_promise(bits, most):
    assert dataclasses.replace(SMALL_MODEL, key_bits=bits, value_bits=bits).effective_bits <= most


def test_small_head_dim_is_one_group():
    assert KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, key_bits=4).channels_per_scale == 8


@pytest.mark.parametrize("bits", [16, 8])
def test_head_dim_may_be_odd_without_rotation(bits):
    KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=33, key_bits=bits, value_bits=bits, is_rotated=False)


def test_fp16_takes_any_head_dim_since_it_is_never_rotated():
    config = KVCacheConfig(num_layers=1, num_kv_heads=1, head_dim=80, key_bits=16, value_bits=16)
    assert not config.page_format.key.is_rotated


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": -1}, "num_kv_heads"),
        ({"head_dim": 64.0}, "head_dim"),
        ({"page_size": True}, "page_size"),
        ({"num_window_tokens": 0}, "num_window_tokens"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
        ({"group_size": 0}, "group_size"),
        ({"key_bits": 5}, "key_bits"),
        ({"value_bits": 8.0}, "value_bits"),
        ({"head_dim": 48}, "is_rotated=False"),
        ({"head_dim": 33, "key_bits": 4, "is_rotated": False}, "even head_dim"),
        ({"head_dim": 48, "value_bits": 4, "is_rotated": False}, "group_size"),
    ],
)
def test_impossible_settings_are_named(change, word):
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(SMALL_MODEL, **change)
