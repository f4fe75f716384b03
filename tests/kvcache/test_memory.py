import pytest
from cache_factories import append, make_config, without_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import KVCacheConfig, QuantizedKVCache
from kvcache.cache import PagedKVCache
from kvcache.memory import bytes_for_tokens, exact_bytes, max_tokens, num_packed_pages
from moe_bitnet.errors import CacheFullError, ConfigError

CONFIGS = st.builds(
    make_config,
    key_bits=st.sampled_from([16, 8, 4, 2]),
    value_bits=st.sampled_from([16, 8, 4, 2]),
    num_sink_tokens=st.sampled_from([0, 64, 128]),
    num_window_tokens=st.sampled_from([0, 1, 63, 64, 100, 128]),
)


@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.integers(1, 10_000), st.integers(1, 4))
def test_bytes_for_tokens_is_the_smallest_budget(config, num_tokens, num_sequences):
    budget_bytes = bytes_for_tokens(config, num_tokens, num_sequences)
    assert max_tokens(config, budget_bytes, num_sequences) >= num_tokens
    assert max_tokens(config, budget_bytes - 1, num_sequences) < num_tokens or budget_bytes == exact_bytes(
        config, num_sequences
    )


@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.integers(0, 10**9), st.integers(1, 4))
def test_max_tokens_is_the_largest_number_that_fits(config, budget_bytes, num_sequences):
    num_tokens = max_tokens(config, budget_bytes, num_sequences)
    if num_tokens:
        assert bytes_for_tokens(config, num_tokens, num_sequences) <= budget_bytes
    assert bytes_for_tokens(config, num_tokens + 1, num_sequences) > budget_bytes


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("num_window", [0, 1, 100, 128])
@pytest.mark.parametrize("num_sinks", [0, 64])
def test_a_cache_takes_max_tokens_in_every_sequence_and_no_more(num_sequences, num_window, num_sinks):
    config = make_config(num_window_tokens=num_window, num_sink_tokens=num_sinks)
    budget_bytes = exact_bytes(config, num_sequences) + (3 * num_sequences + num_sequences // 2) * config.page_bytes
    num_tokens = max_tokens(config, budget_bytes, num_sequences)
    cache = without_attention(PagedKVCache(config, budget_bytes, num_sequences=num_sequences))
    ids = [cache.new_sequence() for _ in range(num_sequences)]
    for chunk_len in (1, 100, num_tokens - 102, 1):
        append(cache, ids, [[5] * chunk_len] * num_sequences)
    cache.check_integrity()
    with pytest.raises(CacheFullError):
        append(cache, ids, [[5]] * num_sequences)
    assert [cache.length(sequence_id) for sequence_id in ids] == [num_tokens] * num_sequences


@settings(max_examples=30, deadline=None)
@given(CONFIGS, st.integers(0, 100_000), st.integers(1, 3))
def test_a_cache_allocates_what_was_computed_to_the_byte(config, spare_bytes, num_sequences):
    budget_bytes = exact_bytes(config, num_sequences) + spare_bytes
    cache = PagedKVCache(config, budget_bytes, num_sequences=num_sequences)
    num_pages = num_packed_pages(config, budget_bytes, num_sequences)
    assert cache.allocated_bytes == exact_bytes(config, num_sequences) + num_pages * config.page_bytes
    assert cache.allocated_bytes == cache._exact.memory.nbytes + cache._packed.memory.nbytes <= budget_bytes
    assert budget_bytes - cache.allocated_bytes < config.page_bytes
    assert cache.budget_bytes == budget_bytes


@pytest.mark.parametrize("make", [PagedKVCache, QuantizedKVCache])
def test_a_budget_below_the_exact_pages_is_refused(make):
    config = make_config()
    assert max_tokens(config, exact_bytes(config) - 1) == 0
    with pytest.raises(ConfigError, match=f"need {exact_bytes(config)}"):
        make(config, exact_bytes(config) - 1)
    assert max_tokens(config, exact_bytes(config)) == 64 + 128 + 63


def test_fewer_bits_hold_more_tokens():
    budget_bytes = 256 * 2**20
    held = [max_tokens(KVCacheConfig(30, 3, 64, bits, bits), budget_bytes) for bits in (16, 8, 4, 2)]
    ratios = [round(num_tokens / held[0], 2) for num_tokens in held]
    assert ratios == sorted(ratios)
    assert ratios[1] > 1.9
    assert ratios[2] > 3.5
