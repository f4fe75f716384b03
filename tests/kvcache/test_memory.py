import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import KVCacheConfig, QuantizedKVCache
from kvcache.memory import bytes_for_tokens, max_tokens
from moe_bitnet.errors import CacheFullError, ConfigError

configs = st.builds(
    KVCacheConfig,
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8]),
    key_bits=st.sampled_from([16, 8, 4]),
    value_bits=st.sampled_from([16, 8, 4]),
    page_size=st.sampled_from([1, 3, 8]),
    num_sink_tokens=st.integers(0, 5),
    num_window_tokens=st.integers(1, 5),
)


def fill(cache, num_tokens_at_a_time=1):
    """Append to all layers until the cache refuses, as a model would."""
    config = cache.config
    chunk = torch.ones(num_tokens_at_a_time, config.num_kv_heads, config.head_dim)
    while True:
        for layer_index in range(config.num_layers):
            try:
                cache.append(layer_index, chunk, chunk)
            except CacheFullError:
                return layer_index


@settings(deadline=None, max_examples=60)
@given(config=configs, extra_bytes=st.integers(0, 2000))
def test_max_tokens_is_what_a_really_filled_cache_holds(config, extra_bytes):
    budget_bytes = config.recent_bytes + extra_bytes
    cache = QuantizedKVCache(config, budget_bytes)
    layer_that_refused = fill(cache)
    assert cache.length == max_tokens(config, budget_bytes)
    assert layer_that_refused == 0
    assert cache.allocated_bytes <= budget_bytes
    cache.check_integrity()


@settings(deadline=None)
@given(config=configs, num_tokens=st.integers(1, 500))
def test_bytes_for_tokens_is_the_smallest_budget_that_holds_them(config, num_tokens):
    budget_bytes = bytes_for_tokens(config, num_tokens)
    assert max_tokens(config, budget_bytes) >= num_tokens
    assert max_tokens(config, budget_bytes - 1) < max(num_tokens, config.max_recent_tokens)


def test_budget_below_the_fp16_region_holds_nothing():
    config = KVCacheConfig(num_layers=2, num_kv_heads=1, head_dim=8)
    assert max_tokens(config, config.recent_bytes - 1) == 0
    with pytest.raises(ConfigError, match=f"need {config.recent_bytes}"):
        QuantizedKVCache(config, config.recent_bytes - 1)


@pytest.mark.parametrize(("bits", "multiple"), [(8, 1.92), (4, 3.7)])
def test_capacity_against_fp16_under_one_budget(bits, multiple):
    sizes = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}
    fp16_tokens = max_tokens(KVCacheConfig(key_bits=16, value_bits=16, **sizes), 2**28)
    assert max_tokens(KVCacheConfig(key_bits=bits, value_bits=bits, **sizes), 2**28) >= multiple * fp16_tokens
