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
    assert SMALL_MODEL.exact_page_bytes == 64 * 23_040


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "bytes_of_head"),
    [
        (16, 16, 2 * 64 * 64 * 2),
        (8, 8, 2 * (64 * 64 + 64)),
        (8, 4, (64 * 64 + 64) + (64 * 32 + 64)),
        (4, 4, 2 * (64 * 32 + 64)),
        (2, 2, 2 * (64 * 16 + 64)),
    ],
)
def test_page_bytes_count_codes_and_scales(key_bits, value_bits, bytes_of_head):
    config = dataclasses.replace(SMALL_MODEL, key_bits=key_bits, value_bits=value_bits)
    assert config.page_bytes == 30 * 3 * bytes_of_head
    assert config.effective_bits == 8 * bytes_of_head / (2 * 64 * 64)


def test_layers_may_differ():
    config = dataclasses.replace(SMALL_MODEL, key_bits=2, value_bits=2, layer_bits=((0, 8, 4), (29, 16, 16)))
    assert config.bits_of_layer(0) == (8, 4)
    assert config.bits_of_layer(1) == (2, 2)
    two_bits = 3 * 2 * (64 * 16 + 64)
    assert config.page_bytes == 28 * two_bits + 3 * (64 * 64 + 64 + 64 * 32 + 64) + 3 * 2 * 64 * 64 * 2


@pytest.mark.parametrize(
    ("num_window_tokens", "num_pages"), [(0, 1 + 1 + 1), (1, 1 + 1 + 1), (2, 1 + 2 + 1), (128, 1 + 3 + 1)]
)
def test_exact_pages_hold_sinks_tail_and_one_in_transition(num_window_tokens, num_pages):
    config = dataclasses.replace(SMALL_MODEL, num_window_tokens=num_window_tokens)
    assert config.exact_pages_per_sequence == num_pages


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": -1}, "num_kv_heads"),
        ({"head_dim": 64.0}, "head_dim"),
        ({"head_dim": True}, "head_dim"),
        ({"head_dim": 72}, "multiple of 16"),
        ({"num_window_tokens": -1}, "num_window_tokens"),
        ({"num_sink_tokens": -64}, "num_sink_tokens"),
        ({"num_sink_tokens": 32}, "multiple of 64"),
        ({"key_bits": 5}, "key_bits"),
        ({"value_bits": 1}, "value_bits"),
        ({"layer_bits": ((30, 8, 8),)}, "layer 30"),
        ({"layer_bits": ((3, 8, 3),)}, "value bits in layer_bits"),
        ({"layer_bits": ((3, 8, 8), (3, 4, 4))}, "twice"),
    ],
)
def test_impossible_settings_are_named(change, word):
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(SMALL_MODEL, **change)
