import pytest
import torch
from cache_factories import without_attention

from kvcache.cache import PagedKVCache
from kvcache.calibration import calibrated_frames
from kvcache.moments import Moments
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS, cache_config, plan_memory
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.errors import CacheFullError, ConfigError

TINY = ModelShape(
    vocab_size=100,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=16,
    num_experts=4,
    top_k=2,
)


def plan(memory_bytes, num_sequences=1, **options):
    return plan_memory(TINY, memory_bytes, TINY.weight_bytes("16"), num_sequences, **options)


def make_cache(config, budget_bytes, num_sequences):
    """A cache that keeps the books and computes nothing."""
    cache = without_attention(PagedKVCache(config, budget_bytes, num_sequences=num_sequences))
    cache._encode_page = lambda layer_format, frame, exact, packed: None
    return cache


def append(cache, sequence_ids, num_tokens):
    key = torch.ones(len(sequence_ids) * num_tokens, 1, 16)
    for layer_index in range(TINY.num_layers):
        cache.extend(layer_index, sequence_ids, key, key, key)


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_the_allocator_agrees_to_the_byte(name, num_sequences):
    memory_bytes = 200_000 + num_sequences * 50_000
    planned = plan(memory_bytes, num_sequences, chunk_len=32)
    entry = next(entry for entry in planned.formats if entry.format == name)
    config = cache_config(TINY, name)
    # without kernels: what is computed does not change what is allocated (test_context fills caches with a model)
    cache = make_cache(config, planned.cache_budget_bytes, num_sequences)
    sequence_ids = [cache.new_sequence() for _ in range(num_sequences)]
    append(cache, sequence_ids, entry.num_tokens - 1)
    append(cache, sequence_ids, 1)
    assert [cache.length(sequence_id) for sequence_id in sequence_ids] == [entry.num_tokens] * num_sequences
    unused = cache.num_free_pages
    assert unused < num_sequences
    assert cache.allocated_bytes == entry.cache_bytes + unused * config.page_bytes <= planned.cache_budget_bytes
    with pytest.raises(CacheFullError):
        append(cache, sequence_ids, 1)
    assert cache.length(sequence_ids[0]) == entry.num_tokens
    # one byte less than what the plan names holds fewer tokens
    smaller = make_cache(config, entry.cache_bytes - 1, num_sequences)
    with pytest.raises(CacheFullError):
        append(smaller, [smaller.new_sequence() for _ in range(num_sequences)], entry.num_tokens)


def test_the_maps_of_a_calibrated_cache_are_counted():
    config = cache_config(TINY, "K4V4")
    moments = Moments.zeros(TINY.num_layers, TINY.num_kv_heads, TINY.head_dim)
    for layer_index in range(TINY.num_layers):
        x = torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(layer_index))
        moments.add(layer_index, x, x, x)
    planes = [plane for frame in calibrated_frames(moments, config) for plane in (frame.key, frame.value)]
    matrices = [matrix for plane in planes for matrix in (plane.encode_matrix, plane.decode_matrix)]
    assert TINY.frame_bytes == sum(matrix.nbytes for matrix in matrices)
    plain, calibrated = plan(1_000_000), plan(1_000_000, is_calibrated=True)
    assert plain.frame_bytes == 0
    assert plain.cache_budget_bytes - calibrated.cache_budget_bytes == calibrated.frame_bytes == TINY.frame_bytes


def test_the_parts_add_up_to_the_memory():
    planned = plan(1_000_003, num_sequences=2, chunk_len=7)
    parts = (planned.weight_bytes, planned.workspace_bytes, planned.logit_bytes, planned.cache_budget_bytes)
    assert sum(parts) == 1_000_003
    assert planned.logit_bytes == 2 * 100 * 4
    assert planned.workspace_bytes == TINY.workspace_bytes(7)
    assert all(entry.cache_bytes <= planned.cache_budget_bytes for entry in planned.formats)


def test_fewer_bits_hold_more():
    planned = plan_memory(KNOWN_SHAPES["llama-3-8b"], 24 * 10**9, KNOWN_SHAPES["llama-3-8b"].weight_bytes("4"))
    multiples = [entry.multiple for entry in planned.formats]
    assert multiples == sorted(multiples)
    assert multiples[0] == 1
    assert [entry.effective_bits for entry in planned.formats] == [16, 8.0625, 6.0625, 4.0625, 3.0625, 2.0625]
    assert multiples[1] > 1.95
    assert multiples[3] > 3.85
    assert multiples[5] > 7.5


@pytest.mark.parametrize("options", [{"num_sequences": 0}, {"chunk_len": 0}])
def test_counts_are_checked(options):
    with pytest.raises(ConfigError, match="at least 1"):
        plan(1_000_000, **options)


def test_a_memory_that_holds_no_cache_is_an_error():
    with pytest.raises(ConfigError, match=r"weights take 16\.06 GB"):
        plan_memory(KNOWN_SHAPES["llama-3-8b"], 16 * 10**9, KNOWN_SHAPES["llama-3-8b"].weight_bytes("16"))
    with pytest.raises(ConfigError, match=r"latent vectors of 576 values \(MLA\)"):
        plan_memory(KNOWN_SHAPES["deepseek-v3"], 10**13, 0)
    with pytest.raises(ConfigError, match="multiple of 16"):
        plan_memory(ModelShape(10, 20, 1, 1, 1, 20, 10), 10**6, 0)
