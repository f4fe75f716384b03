import itertools

import pytest
import torch

from kvcache import KVCacheConfig, QuantizedKVCache
from kvcache.codec import decode_pages, encode_page
from kvcache.memory import bytes_for_tokens
from kvcache.transform import rotate, unrotate
from moe_bitnet.errors import CacheFullError, ShapeError

FORMATS = list(itertools.product([16, 8, 4], repeat=2))
NUM_KV_HEADS = 2
HEAD_DIM = 8


def make_config(key_bits=4, value_bits=4, **change):
    sizes = {"num_layers": 2, "page_size": 5, "num_sink_tokens": 3, "num_window_tokens": 4}
    return KVCacheConfig(
        num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, key_bits=key_bits, value_bits=value_bits, **{**sizes, **change}
    )


def make_cache(config, num_tokens):
    """Make a cache with no byte more than ``num_tokens`` tokens need."""
    return QuantizedKVCache(config, bytes_for_tokens(config, num_tokens))


def random_tokens(num_tokens, num_heads=NUM_KV_HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator)


def append_in_chunks(cache, key, value, chunk_size):
    for start in range(0, len(key), chunk_size):
        for layer_index in range(cache.config.num_layers):
            chunk = slice(start, start + chunk_size)
            cache.append(layer_index, key[chunk], value[chunk])


def stored_bytes(cache, layer_index=0):
    """Return the sealed pages of a layer and its float16 tokens, sinks first."""
    page_ids = cache._page_table[layer_index][: cache._num_sealed[layer_index]]
    recent = torch.cat((cache._recent.sinks(layer_index), cache._recent.window(layer_index)), dim=2)
    return cache._pool.read(page_ids), recent


def dense_attention(query, key, value, dtype):
    """Causal attention of the last ``len(query)`` tokens with the whole score matrix, in one dtype throughout.

    Args:
        query: ``[T, N, D]``.
        key: ``[S, G, D]``.
        value: ``[S, G, D]``.
        dtype: float32 for the plain path, float64 for the truth.
    """
    query, key, value = (x.transpose(0, 1).to(dtype) for x in (query, key, value))
    is_visible = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
    output = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=is_visible, enable_gqa=True
    )
    return output[0].transpose(0, 1)


def assert_as_exact_as_float32(output, plain, truth):
    two_ulps = 2 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (output - truth).abs().max() <= (plain - truth).abs().max() + two_ulps


def through_pages(config, x, is_key):
    """Replace the tokens that a cache of ``len(x)`` tokens has sealed by what their pages decode to, unrotated."""
    x = x.half().float().clone()
    page_size = config.page_size
    first = config.num_sink_tokens
    while first + page_size + config.num_window_tokens <= len(x):
        page = x[first : first + page_size].transpose(0, 1)
        decoded = decode_pages(config.page_format, encode_page(config.page_format, page, page)[None])[not is_key]
        plane = config.page_format.key if is_key else config.page_format.value
        x[first : first + page_size] = (unrotate(decoded) if plane.is_rotated else decoded).transpose(0, 1)
        first += page_size
    return x


@pytest.mark.parametrize("num_tokens", [1, 3, 7, 12, 33])
@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_fp16_cache_matches_dense_attention(num_tokens, num_heads):
    key, value = random_tokens(num_tokens, seed=1), random_tokens(num_tokens, seed=2)
    cache = make_cache(make_config(16, 16), num_tokens)
    append_in_chunks(cache, key, value, chunk_size=num_tokens)
    for num_queries in {1, (num_tokens + 1) // 2, num_tokens}:
        query = random_tokens(num_queries, num_heads, seed=3)
        plain, truth = (
            dense_attention(query, key.half(), value.half(), dtype) for dtype in (torch.float32, torch.float64)
        )
        for layer_index in range(2):
            assert_as_exact_as_float32(cache.attend(layer_index, query), plain, truth)


def test_fp16_cache_matches_dense_attention_over_many_tiles():
    key, value, query = random_tokens(1300, seed=1), random_tokens(1300, seed=2), random_tokens(600, 4, seed=3)
    cache = make_cache(make_config(16, 16, page_size=64), 1300)
    append_in_chunks(cache, key, value, chunk_size=500)
    plain, truth = (dense_attention(query, key.half(), value.half(), dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact_as_float32(cache.attend(0, query), plain, truth)


@pytest.mark.parametrize(("key_bits", "value_bits"), FORMATS)
@pytest.mark.parametrize("is_rotated", [True, False])
def test_quantized_cache_attends_to_what_its_pages_decode_to(key_bits, value_bits, is_rotated):
    config = make_config(key_bits, value_bits, is_rotated=is_rotated)
    key, value, query = random_tokens(33, seed=1), random_tokens(33, seed=2), random_tokens(6, 4, seed=3)
    cache = make_cache(config, 33)
    append_in_chunks(cache, key, value, chunk_size=33)
    stored_key, stored_value = through_pages(config, key, is_key=True), through_pages(config, value, is_key=False)
    truth = dense_attention(query, stored_key, stored_value, torch.float64)
    # The plain path makes the same detour: rotated in float32, attended, rotated back.
    plain = unrotate(dense_attention(rotate(query), rotate(stored_key), rotate(stored_value), torch.float32))
    assert_as_exact_as_float32(cache.attend(1, query), plain, truth)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(8, 8), (8, 4), (4, 4)])
def test_fewer_bits_cost_no_more_than_their_noise(key_bits, value_bits):
    # With equal keys the output is the mean of the values: its error is that of the values' codes at most.
    config = make_config(key_bits, value_bits)
    key, value = torch.ones(33, NUM_KV_HEADS, HEAD_DIM), random_tokens(33, seed=2)
    cache = make_cache(config, 33)
    append_in_chunks(cache, key, value, chunk_size=33)
    error = torch.linalg.vector_norm(
        cache.attend(0, torch.zeros(1, NUM_KV_HEADS, HEAD_DIM)) - value.mean(dim=0), dim=-1
    )
    largest_code_error = torch.linalg.vector_norm(through_pages(config, value, is_key=False) - value, dim=-1).max()
    assert (error <= largest_code_error).all()


@pytest.mark.parametrize(("key_bits", "value_bits"), FORMATS)
@pytest.mark.parametrize("chunk_size", [2, 7, 33])
def test_chunked_append_stores_the_same_bits_as_one_by_one(key_bits, value_bits, chunk_size):
    key, value = random_tokens(33, seed=1), random_tokens(33, seed=2)
    caches = [make_cache(make_config(key_bits, value_bits), 33) for _ in range(2)]
    append_in_chunks(caches[0], key, value, chunk_size=1)
    append_in_chunks(caches[1], key, value, chunk_size=chunk_size)
    for one, other in zip(stored_bytes(caches[0], 1), stored_bytes(caches[1], 1), strict=True):
        assert torch.equal(one, other)
    query = random_tokens(33, seed=3)
    assert torch.equal(caches[0].attend(1, query), caches[1].attend(1, query))


@pytest.mark.parametrize("chunk_size", [1, 4, 11])
def test_sealed_pages_never_change(chunk_size):
    key, value = random_tokens(60, seed=1), random_tokens(60, seed=2)
    cache = make_cache(make_config(), 60)
    pages_before = torch.empty(0, cache.config.page_bytes, dtype=torch.uint8)
    for start in range(0, 60, chunk_size):
        append_in_chunks(cache, key[start : start + chunk_size], value[start : start + chunk_size], chunk_size)
        pages, _ = stored_bytes(cache)
        assert torch.equal(pages[: len(pages_before)], pages_before)
        pages_before = pages
        cache.check_integrity()
    assert len(pages_before) == (60 - 3 - 4) // 5


def test_window_and_sinks_stay_fp16():
    cache = make_cache(make_config(), 60)
    key = random_tokens(60).half()
    for num_tokens in range(1, 61):
        append_in_chunks(cache, key[num_tokens - 1 : num_tokens], key[num_tokens - 1 : num_tokens], 1)
        _, recent = stored_bytes(cache)
        assert torch.equal(recent[0, :, :3].transpose(0, 1), key[: min(3, num_tokens)])
        num_in_window = recent.shape[2] - 3
        assert num_in_window <= 4 + 5 - 1
        if num_tokens >= 3 + 4:
            assert num_in_window >= 4
            assert torch.equal(recent[0, :, 3:].transpose(0, 1), key[num_tokens - num_in_window : num_tokens])


@pytest.mark.parametrize(("key_bits", "value_bits"), FORMATS)
def test_query_never_sees_later_tokens_of_its_chunk(key_bits, value_bits):
    outputs = []
    for seed in (1, 2):  # the same 29 tokens, then four that differ
        key = torch.cat((random_tokens(29), 100 * random_tokens(4, seed=seed)))
        cache = make_cache(make_config(key_bits, value_bits), 33)
        append_in_chunks(cache, key, key, chunk_size=33)
        outputs.append(cache.attend(0, random_tokens(20, seed=3)))
    assert torch.equal(outputs[0][:16], outputs[1][:16])
    assert not torch.equal(outputs[0][16:], outputs[1][16:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_dtype_of_the_query(dtype):
    cache = make_cache(make_config(), 20)
    key = random_tokens(20)
    append_in_chunks(cache, key.to(dtype), key.to(dtype), chunk_size=20)
    query = random_tokens(2).to(dtype)
    output = cache.attend(0, query)
    assert output.dtype == dtype
    assert torch.equal(output, cache.attend(0, query.float()).to(dtype))


def test_cache_takes_no_part_in_autograd():
    cache = make_cache(make_config(), 20)
    key = random_tokens(20).requires_grad_()
    append_in_chunks(cache, key, key, chunk_size=20)
    assert not cache.attend(0, key[-1:]).requires_grad


def test_length_counts_tokens_that_every_layer_holds():
    cache = make_cache(make_config(), 20)
    assert cache.length == 0
    key = random_tokens(20)
    cache.append(0, key, key)
    assert cache.length == 0
    cache.append(1, key[:13], key[:13])
    assert cache.length == 13
    cache.check_integrity()


@pytest.mark.parametrize(("key_bits", "value_bits"), FORMATS)
@pytest.mark.parametrize("num_held", [13, 36])
def test_full_cache_loses_nothing(key_bits, value_bits, num_held):
    config = make_config(key_bits, value_bits)
    cache = make_cache(config, 36)
    key, query = random_tokens(100), random_tokens(5, 4, seed=3)
    append_in_chunks(cache, key[:num_held], key[:num_held], chunk_size=7)
    stored_before, output_before = stored_bytes(cache), cache.attend(0, query)
    num_asked = 2 * ((100 - 3 - 4) // 5 - (num_held - 3 - 4) // 5)
    num_free = 2 * ((36 - 3 - 4) // 5 - (num_held - 3 - 4) // 5)
    with pytest.raises(CacheFullError, match=f"asked for {num_asked} pages, {num_free} of 10 are free"):
        cache.append(0, key[num_held:], key[num_held:])
    assert cache.length == num_held
    assert all(torch.equal(one, other) for one, other in zip(stored_before, stored_bytes(cache), strict=True))
    assert torch.equal(cache.attend(0, query), output_before)
    cache.check_integrity()
    append_in_chunks(cache, key[num_held:36], key[num_held:36], chunk_size=7)  # what does fit is still welcome
    assert cache.length == 36


def test_step_is_refused_in_its_first_layer_or_not_at_all():
    config = make_config(num_layers=3)
    # Pages for two layers of three are not enough for a step of the model.
    cache = QuantizedKVCache(config, config.recent_bytes + 2 * config.page_bytes)
    key = random_tokens(config.max_recent_tokens)
    append_in_chunks(cache, key, key, chunk_size=len(key))
    with pytest.raises(CacheFullError):
        cache.append(0, key[:1], key[:1])
    assert cache.length == config.max_recent_tokens


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65520.0])
@pytest.mark.parametrize("is_key", [True, False])
def test_elements_that_are_not_finite_in_fp16_are_refused(bad, is_key):
    cache = make_cache(make_config(), 33)
    good = random_tokens(20)
    append_in_chunks(cache, good, good, chunk_size=20)
    stored_before = stored_bytes(cache)
    chunk = random_tokens(7)
    chunk[6, 1, 7] = bad
    with pytest.raises(ShapeError, match="1 elements of " + ("key" if is_key else "value")):
        cache.append(0, *((chunk, good[:7]) if is_key else (good[:7], chunk)))
    assert all(torch.equal(one, other) for one, other in zip(stored_before, stored_bytes(cache), strict=True))
    cache.check_integrity()


@pytest.mark.parametrize(
    ("layer_index", "key_shape", "value_shape", "word"),
    [
        (2, (1, 2, 8), (1, 2, 8), "2 layers"),
        (-1, (1, 2, 8), (1, 2, 8), "2 layers"),
        (0, (0, 2, 8), (0, 2, 8), "num_tokens >= 1"),
        (0, (1, 4, 8), (1, 4, 8), r"\[1, 4, 8\]"),
        (0, (1, 2, 4), (1, 2, 4), r"\[1, 2, 4\]"),
        (0, (2, 8), (2, 8), r"\[2, 8\]"),
        (0, (2, 2, 8), (1, 2, 8), "same"),
    ],
)
def test_append_names_a_wrong_shape(layer_index, key_shape, value_shape, word):
    cache = make_cache(make_config(), 33)
    with pytest.raises(ShapeError, match=word):
        cache.append(layer_index, torch.ones(key_shape), torch.ones(value_shape))
    assert cache.length == 0


def test_append_refuses_integers():
    with pytest.raises(ShapeError, match="int64"):
        make_cache(make_config(), 33).append(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    "query",
    [
        torch.ones(8, 2, 8),
        torch.ones(0, 2, 8),
        torch.ones(1, 3, 8),
        torch.ones(1, 0, 8),
        torch.ones(1, 2, 16),
        torch.ones(2, 8),
        torch.ones(1, 2, 8, dtype=torch.int32),
    ],
)
def test_attend_names_a_wrong_query(query):
    cache = make_cache(make_config(), 33)
    append_in_chunks(cache, random_tokens(7), random_tokens(7), chunk_size=7)
    with pytest.raises(ShapeError, match="holds 7 tokens"):
        cache.attend(0, query)


def test_freed_cache_takes_a_new_sequence_like_a_new_one():
    config = make_config()
    cache, new = make_cache(config, 36), make_cache(config, 36)
    old_key, key = random_tokens(36, seed=1), random_tokens(36, seed=2)
    append_in_chunks(cache, old_key, old_key, chunk_size=5)
    allocated_bytes = cache.allocated_bytes
    cache.free()
    cache.check_integrity()
    assert cache.length == 0
    assert cache.allocated_bytes == allocated_bytes
    for each in (cache, new):
        append_in_chunks(each, key, key, chunk_size=36)
    query = random_tokens(3, seed=3)
    assert torch.equal(cache.attend(0, query), new.attend(0, query))


def test_allocated_bytes_count_pages_and_fp16_region():
    config = make_config()
    budget_bytes = bytes_for_tokens(config, 36)
    assert QuantizedKVCache(config, budget_bytes).allocated_bytes == budget_bytes
    assert QuantizedKVCache(config, budget_bytes + 1).allocated_bytes == budget_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"num_sink_tokens": 0},
        {"num_window_tokens": 1},
        {"page_size": 1},
        {"num_sink_tokens": 0, "num_window_tokens": 1, "page_size": 1},
        {"page_size": 16, "num_window_tokens": 3},
    ],
)
def test_odd_sizes_hold_and_attend(change):
    config = make_config(16, 16, **change)
    key, value, query = random_tokens(33, seed=1), random_tokens(33, seed=2), random_tokens(33, seed=3)
    cache = make_cache(config, 33)
    append_in_chunks(cache, key, value, chunk_size=7)
    cache.check_integrity()
    plain, truth = (dense_attention(query, key.half(), value.half(), dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact_as_float32(cache.attend(0, query), plain, truth)
