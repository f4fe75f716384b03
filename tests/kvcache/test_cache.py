import pytest
import torch
from cache_factories import (
    HEAD_DIM,
    NUM_KV_HEADS,
    DictTier,
    append,
    assert_holds,
    dense_attention,
    make_cache,
    make_config,
    packed_layer,
    stored,
    vectors,
    without_attention,
)
from factories import HalfCache, random_token_ids, tiny_model
from numerics import EPS

from kvcache import QuantizedKVCache
from kvcache.cache import PagedKVCache
from kvcache.calibration import plain_frames
from kvcache.memory import bytes_for_tokens
from moe_bitnet.errors import CacheFullError, ConfigError, DataError, ShapeError
from moe_bitnet.generation import generate

FORMATS = [(16, 16), (8, 8), (4, 2), (16, 4)]
TEXT = [position * position % 31 for position in range(2000)]


def extend_all(cache, sequence_ids, query, key, value, counts=None):
    """One step with the same tensors in every layer; the outputs of all layers."""
    layers = range(cache.config.num_layers)
    return torch.stack([cache.extend(layer, sequence_ids, query, key, value, counts) for layer in layers])


def run(cache, sequence_id, query, key, value, chunk_len):
    """Outputs ``[L, T, N, D]`` of a sequence that takes its tokens in chunks."""
    parts = [
        extend_all(cache, [sequence_id], *(x[start : start + chunk_len] for x in (query, key, value)))
        for start in range(0, len(query), chunk_len)
    ]
    return torch.cat(parts, dim=1)


def assert_near_truth(output, query, key, value, scale=None):
    """Float32 sums of rounded products: the error of scores and weights grows with the size of the scores."""
    key, value = key.half(), value.half()
    truth = dense_attention(query, key, value, scale)
    scale = HEAD_DIM**-0.5 if scale is None else scale
    largest_score = query.norm(dim=-1).max() * key.float().norm(dim=-1).max() * scale
    allowed = 8 * EPS * (1 + largest_score) * value.float().abs().max()
    assert float((output.double() - truth).abs().max()) <= float(allowed)


@pytest.mark.parametrize("chunk_len", [1, 50, 64, 150, 400])
@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("sizes", [(64, 128), (0, 0), (64, 20)])
def test_16_bits_equal_dense_attention(chunk_len, num_heads, sizes):
    num_tokens = 330 if chunk_len > 1 else 90
    query, key, value = vectors(num_tokens, num_heads, seed=1), vectors(num_tokens, seed=2), vectors(num_tokens, seed=3)
    cache = make_cache(make_config(num_sink_tokens=sizes[0], num_window_tokens=sizes[1]), num_tokens)
    for layer_output in run(cache, cache.new_sequence(), query, key, value, chunk_len):
        assert_near_truth(layer_output, query, key, value)
    cache.check_integrity()


@pytest.mark.parametrize(("key_bits", "value_bits"), FORMATS)
def test_fewer_bits_attend_to_what_their_pages_decode_to(key_bits, value_bits):
    config = make_config(key_bits, value_bits, num_window_tokens=20)
    query, key, value = vectors(220, 4, seed=1), vectors(220, seed=2), vectors(220, seed=3)
    cache = make_cache(config, 240)
    sequence_id = cache.new_sequence()
    run(cache, sequence_id, query, key, value, 200)
    held_key, held_value = held(cache, sequence_id, 1)
    fresh = [x[:20] for x in (query, key, value)]
    output = extend_all(cache, [sequence_id], *fresh)[1]
    truth = dense_attention(fresh[0], torch.cat((held_key, fresh[1])), torch.cat((held_value, fresh[2])))
    # digits of queries and weights: 7 bits of a score of about 1, 8 bits of a value; 16 bits have neither
    assert float((output - truth).abs().max()) < (2e-3 if (key_bits, value_bits) == (16, 16) else 3e-2)


def held(cache, sequence_id, layer_index):
    """Keys and values that a layer holds, out of their frames."""
    parts = list(stored(cache, sequence_id, layer_index))
    table, layer = cache._tables[sequence_id], cache._format.layers[layer_index]
    packed = slice(64 * table.num_sink_pages, 64 * table.sealed_ends[layer_index])
    frame = cache._frames[layer_index]
    for index, (plane, plane_frame) in enumerate(((layer.key, frame.key), (layer.value, frame.value))):
        if plane.num_bits < 16:
            parts[index][packed] = plane_frame.decode(parts[index][packed].transpose(0, 1)).transpose(0, 1)
    return parts


def test_layers_may_differ_in_bits():
    config = make_config(4, 2, num_layers=3, layer_bits=((0, 16, 16), (2, 8, 8)), num_window_tokens=0)
    query, key, value = vectors(200, 4, seed=1), vectors(200, seed=2), vectors(200, seed=3)
    cache = make_cache(config, 200)
    outputs = run(cache, cache.new_sequence(), query, key, value, 80)
    truth = dense_attention(query, key, value)
    errors = [float((output - truth).norm()) for output in outputs]
    assert errors[0] < errors[2] < errors[1]
    assert_near_truth(outputs[0], query, key, value)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 16), (8, 8)])
@pytest.mark.parametrize("chunk_len", [7, 64, 333])
def test_chunks_store_the_same_bits_as_single_tokens(key_bits, value_bits, chunk_len):
    config = make_config(key_bits, value_bits)
    contents = []
    for length in (1, chunk_len):
        cache = without_attention(make_cache(config, 400))
        sequence_id = cache.new_sequence()
        for start in range(0, 400, length):
            append(cache, [sequence_id], [TEXT[start : min(400, start + length)]])
        contents.append([stored(cache, sequence_id, layer_index) for layer_index in range(2)])
        contents[-1] += [packed_layer(cache, sequence_id, layer, page) for layer in range(2) for page in range(1, 4)]
    assert all(torch.equal(one, other) for one, other in zip(*contents, strict=True))


def test_sequences_of_a_batch_compute_what_they_compute_alone():
    config, counts = make_config(8, 8), [1, 70, 3, 1]
    together = make_cache(config, 500, num_sequences=4)
    ids = [together.new_sequence() for _ in counts]
    alone = [make_cache(config, 500) for _ in counts]
    alone_ids = [cache.new_sequence() for cache in alone]
    for step in range(6):
        step_counts = [1] * 4 if step % 2 else counts
        total = sum(step_counts)
        tensors = (vectors(total, 4, seed=step), vectors(total, seed=10 + step), vectors(total, seed=20 + step))
        outputs = extend_all(together, ids, *tensors, step_counts)
        rows = torch.arange(total).split(step_counts)
        for cache, sequence_id, own in zip(alone, alone_ids, rows, strict=True):
            assert torch.equal(outputs[:, own], extend_all(cache, [sequence_id], *(x[own] for x in tensors)))
    together.check_integrity()


def test_equally_many_tokens_need_not_be_counted():
    cache = make_cache(make_config(), 100, num_sequences=3)
    ids = [cache.new_sequence() for _ in range(3)]
    extend_all(cache, ids, vectors(6), vectors(6), vectors(6))
    assert [cache.length(sequence_id) for sequence_id in ids] == [2, 2, 2]


def test_layers_may_split_a_batch_differently():
    cache = without_attention(make_cache(make_config(), 400, num_sequences=2))
    one, two = cache.new_sequence(), cache.new_sequence()
    append(cache, [one, two], [TEXT[:300], TEXT[:10]])
    append(cache, [one, two], [TEXT[300:390], TEXT[10:15]], layers=[0])
    append(cache, [two], [TEXT[10:15]], layers=[1])
    append(cache, [one], [TEXT[300:390]], layers=[1])
    assert_holds(cache, one, TEXT[:390])
    assert_holds(cache, two, TEXT[:15])
    cache.check_integrity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_dtype_of_the_query(dtype):
    outputs = []
    query, key, value = vectors(20, seed=1).to(dtype), vectors(20, seed=2).to(dtype), vectors(20, seed=3).to(dtype)
    for cast in (dtype, torch.float32):
        cache = make_cache(make_config(), 20)
        outputs.append(extend_all(cache, [cache.new_sequence()], query.to(cast), key.to(cast), value.to(cast)))
    assert outputs[0].dtype == dtype
    assert torch.equal(outputs[0], outputs[1].to(dtype))


def test_tensors_need_not_be_contiguous_and_take_no_part_in_autograd():
    cache, other = make_cache(make_config(), 20), make_cache(make_config(), 20)
    tensors = [vectors(20, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1).half() for x in tensors]
    output = extend_all(cache, [cache.new_sequence()], *strided)
    assert not output.requires_grad
    assert torch.equal(output, extend_all(other, [other.new_sequence()], *(x.half() for x in tensors)))


def test_another_scale_can_be_given():
    query, key, value = vectors(20, 4, seed=1), vectors(20, seed=2), vectors(20, seed=3)
    cache = make_cache(make_config(), 20)
    output = cache.extend(0, [cache.new_sequence()], query, key, value, scale=0.7)
    assert_near_truth(output, query, key, value, scale=0.7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65520.0])
@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize("layer_index", [0, 1])
def test_elements_that_are_not_finite_in_fp16_are_refused(bad, is_key, layer_index):
    cache = without_attention(make_cache(make_config(), 400))
    sequence_id = cache.new_sequence()
    append(cache, [sequence_id], [TEXT[:250]])
    append(cache, [sequence_id], [TEXT[250:257]], layers=range(layer_index))
    before = cache._exact.memory.clone()
    good, chunk = vectors(7), vectors(7)
    chunk[6, 1, 7] = bad
    with pytest.raises(ShapeError, match="1 elements of " + ("key" if is_key else "value")):
        cache.extend(layer_index, [sequence_id], good, *((chunk, good) if is_key else (good, chunk)))
    assert torch.equal(cache._exact.memory, before)
    cache.check_integrity()
    append(cache, [sequence_id], [TEXT[250:257]], layers=range(layer_index, 2))
    assert_holds(cache, sequence_id, TEXT[:257])


def test_the_largest_fp16_numbers_are_taken():
    cache = make_cache(make_config(), 10)
    large = torch.full((1, NUM_KV_HEADS, HEAD_DIM), 65519.0)
    cache.extend(0, [cache.new_sequence()], torch.zeros_like(large), large, large)


GOOD = (2, NUM_KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("layer_index", "query", "key", "value", "word"),
    [
        (2, GOOD, GOOD, GOOD, "2 layers"),
        (-1, GOOD, GOOD, GOOD, "2 layers"),
        (0, (0, 2, 16), (0, 2, 16), (0, 2, 16), "at least one token"),
        (0, GOOD, (2, 4, 16), GOOD, r"key torch.float32 \[2, 4, 16\]"),
        (0, GOOD, GOOD, (2, 2, 8), r"value torch.float32 \[2, 2, 8\]"),
        (0, GOOD, GOOD, (1, 2, 16), r"\[1, 2, 16\]"),
        (0, (2, 3, 16), GOOD, GOOD, "a multiple of 2"),
        (0, (2, 0, 16), GOOD, GOOD, "a multiple of 2"),
        (0, (2, 16), GOOD, GOOD, r"query is torch.float32 \[2, 16\]"),
    ],
)
def test_wrong_shapes_are_named(layer_index, query, key, value, word):
    cache = make_cache(make_config(), 33)
    sequence_id = cache.new_sequence()
    with pytest.raises(ShapeError, match=word):
        cache.extend(layer_index, [sequence_id], torch.ones(query), torch.ones(key), torch.ones(value))
    assert cache.length(sequence_id) == 0
    cache.check_integrity()


def test_integers_and_wrong_counts_are_refused():
    cache = make_cache(make_config(), 33, num_sequences=2)
    ids, good = [cache.new_sequence(), cache.new_sequence()], torch.ones(3, NUM_KV_HEADS, HEAD_DIM)
    with pytest.raises(ShapeError, match="int64"):
        cache.extend(0, ids[:1], good, good.long(), good)
    for counts in (None, [1, 1], [3], [3, 0], [4, -1]):
        with pytest.raises(ShapeError, match="3 tokens for 2 sequences"):
            cache.extend(0, ids, good, good, good, counts)
    with pytest.raises(ShapeError, match="0 sequences"):
        cache.extend(0, [], good, good, good)
    with pytest.raises(ShapeError, match="twice"):
        cache.extend(0, ids[:1] * 3, good, good, good)
    with pytest.raises(ConfigError, match="no sequence 77"):
        cache.extend(0, [77], good, good, good)
    cache.check_integrity()


def test_every_layer_has_its_turn_once_a_step():
    cache = without_attention(make_cache(make_config(), 400))
    sequence_id = cache.new_sequence()
    append(cache, [sequence_id], [TEXT[:10]], layers=[1])
    with pytest.raises(ShapeError, match=r"from 0 to 10 tokens is under way, and layers \[1\] have had their turn"):
        append(cache, [sequence_id], [TEXT[:10]], layers=[1])
    with pytest.raises(ShapeError, match="layer 0 cannot take 9 tokens"):
        append(cache, [sequence_id], [TEXT[:9]], layers=[0])
    for call in (cache.fork, lambda s: cache.publish_prefix(s, TEXT[:64]), lambda s: cache.spill(s, DictTier())):
        with pytest.raises(ConfigError, match="in the middle of a step"):
            call(sequence_id)
    assert cache.length(sequence_id) == 0
    append(cache, [sequence_id], [TEXT[:10]], layers=[0])
    assert_holds(cache, sequence_id, TEXT[:10])


def test_a_step_is_refused_in_its_first_layer_and_others_go_on():
    config = make_config(num_layers=3)
    budget_bytes = bytes_for_tokens(config, 319, num_sequences=2) - config.page_bytes
    cache = without_attention(PagedKVCache(config, budget_bytes, num_sequences=2))
    one, two = cache.new_sequence(), cache.new_sequence()
    append(cache, [one, two], [TEXT[:319], TEXT[:250]])
    before = cache._exact.memory.clone(), cache._packed.memory.clone()
    for chunks in ([TEXT[319:320], TEXT[250:251]], [TEXT[319:320], TEXT[250:500]]):
        with pytest.raises(CacheFullError, match=f"packed pages, 0 of 1 are free .{config.page_bytes} bytes each"):
            append(cache, [one, two], chunks)
        assert cache.length(one) == 319
        assert torch.equal(cache._exact.memory, before[0])
        assert torch.equal(cache._packed.memory, before[1])
        cache.check_integrity()
    append(cache, [two], [TEXT[250:255]])
    cache.free(two)
    with pytest.raises(CacheFullError):
        append(cache, [one], [TEXT[319:320]])
    assert_holds(cache, one, TEXT[:319])


@pytest.mark.parametrize("count", [1, 64, 300])
def test_a_failed_kernel_can_be_tried_again_or_taken_back(count):
    cache = without_attention(make_cache(make_config(8, 8), 700))
    sequence_id = cache.new_sequence()
    append(cache, [sequence_id], [TEXT[:319]])
    expected = [stored(cache, sequence_id, layer_index) for layer_index in range(2)]
    good_encode, good_attention = cache._encode_page, cache._paged_attention

    def fail(*_):
        raise RuntimeError("out of luck")

    for name, good in (("_encode_page", good_encode), ("_paged_attention", good_attention)):
        append(cache, [sequence_id], [TEXT[319 : 319 + count]], layers=[0])
        setattr(cache, name, fail)
        with pytest.raises(RuntimeError, match="luck"):
            append(cache, [sequence_id], [TEXT[319 : 319 + count]], layers=[1])
        setattr(cache, name, good)
        cache.truncate(sequence_id, 319)
        cache.check_integrity()
        # layer 0 has sealed what the step's end left behind; layer 1 reads the same tokens as before
        assert torch.equal(stored(cache, sequence_id, 1), expected[1])
    append(cache, [sequence_id], [TEXT[319 : 319 + count]], layers=[0])
    cache._encode_page = fail
    with pytest.raises(RuntimeError, match="luck"):
        append(cache, [sequence_id], [TEXT[319 : 319 + count]], layers=[1])
    cache._encode_page = good_encode
    append(cache, [sequence_id], [TEXT[319 : 319 + count]], layers=[1])
    cache.check_integrity()
    fresh = without_attention(make_cache(make_config(8, 8), 700))
    other_id = fresh.new_sequence()
    append(fresh, [other_id], [TEXT[: 319 + count]])
    for layer_index in range(2):
        assert torch.equal(stored(cache, sequence_id, layer_index), stored(fresh, other_id, layer_index))


def test_a_fork_shares_pages_until_one_of_both_writes():
    cache = without_attention(make_cache(make_config(), 600, num_sequences=2))
    one = cache.new_sequence()
    append(cache, [one], [TEXT[:450]])
    num_free = cache._exact.num_free_pages, cache._packed.num_free_pages
    two = cache.fork(one)
    assert (cache._exact.num_free_pages, cache._packed.num_free_pages) == num_free
    append(cache, [two], [[7] * 30])
    assert cache._exact.num_free_pages == num_free[0] - 1  # the page that was partly full
    append(cache, [one], [TEXT[450:452]])
    assert_holds(cache, one, TEXT[:452])
    assert_holds(cache, two, TEXT[:450] + [7] * 30)
    append(cache, [one, two], [TEXT[452:600], [8] * 120])
    assert_holds(cache, two, TEXT[:450] + [7] * 30 + [8] * 120)
    cache.free(one)
    cache.check_integrity()
    assert_holds(cache, two, TEXT[:450] + [7] * 30 + [8] * 120)


def test_truncating_says_what_is_allowed():
    cache = without_attention(make_cache(make_config(8, 8), 500))
    sequence_id = cache.new_sequence()
    append(cache, [sequence_id], [TEXT[:500]])
    with pytest.raises(ConfigError, match=r"multiple of 64, a number up to 64, or one from 320 to 500"):
        cache.truncate(sequence_id, 200)
    with pytest.raises(ConfigError, match="has 0 to 500"):
        cache.truncate(sequence_id, 501)
    with pytest.raises(ConfigError, match="has 0 to 500"):
        cache.truncate(sequence_id, -1)
    assert cache.length(sequence_id) == 500
    for num_tokens in (500, 450, 320, 256, 64, 33, 0):
        cache.truncate(sequence_id, num_tokens)
        assert cache.length(sequence_id) == num_tokens
        cache.check_integrity()
    assert cache._packed.num_free_pages == cache._packed.num_pages


@pytest.mark.parametrize("num_tokens", [450, 320, 128, 30])
def test_a_truncated_sequence_goes_on_as_if_it_had_never_been_longer(num_tokens):
    cache = without_attention(make_cache(make_config(), 600))
    sequence_id = cache.new_sequence()
    append(cache, [sequence_id], [[*TEXT[:num_tokens], *[7] * (500 - num_tokens)]])
    cache.truncate(sequence_id, num_tokens)
    assert_holds(cache, sequence_id, TEXT[:num_tokens])
    for start in range(num_tokens, 600, 50):
        append(cache, [sequence_id], [TEXT[start : min(600, start + 50)]])
        cache.check_integrity()
    assert_holds(cache, sequence_id, TEXT[:600])


def test_a_published_beginning_is_computed_once():
    config = make_config(8, 8)
    cache = without_attention(make_cache(config, 700, num_sequences=2))
    one, num_matched = cache.share_prefix(TEXT[:500])
    assert num_matched == 0
    append(cache, [one], [TEXT[:500]])
    cache.publish_prefix(one, TEXT[:500])
    num_free = cache.num_free_pages
    two, num_matched = cache.share_prefix([*TEXT[:450], 1, 2, 3])
    assert num_matched == cache.length(two) == 320  # the pages that the window has passed
    assert cache.num_free_pages == num_free
    for layer_index in range(2):
        expected = stored(cache, one, layer_index)[:, :320]
        assert torch.equal(stored(cache, two, layer_index), expected)
    assert cache.share_prefix(TEXT[:320])[1] == 256, "one token at least is left to compute"
    assert cache.share_prefix(TEXT[:500], salt=b"another tenant")[1] == 0
    assert cache.share_prefix([])[1] == 0
    append(cache, [two], [TEXT[320:460]])
    cache.check_integrity()


def test_idle_beginnings_make_room_when_pages_run_short():
    cache = without_attention(make_cache(make_config(), 500))
    one = cache.new_sequence()
    append(cache, [one], [TEXT[:500]])
    cache.publish_prefix(one, TEXT[:500])
    cache.free(one)
    assert cache.num_free_pages == cache._packed.num_pages
    assert cache.share_prefix(TEXT[:500])[1] == 320
    cache.free(cache.sequence_ids[0])
    two = cache.new_sequence()
    append(cache, [two], [[9] * 500])
    cache.check_integrity()
    assert cache._index.owned_ids(is_packed=True) == []
    with pytest.raises(CacheFullError):
        append(cache, [two], [[9] * 300])


def test_beginnings_in_use_are_not_evicted():
    cache = without_attention(make_cache(make_config(), 500))
    one = cache.new_sequence()
    append(cache, [one], [TEXT[:500]])
    cache.publish_prefix(one, TEXT)
    cache.free(one)
    two, _ = cache.share_prefix(TEXT[:500])
    with pytest.raises(CacheFullError):
        append(cache, [two], [TEXT[320:900]])
    assert_holds(cache, two, TEXT[:320])
    append(cache, [two], [TEXT[320:500]])
    assert_holds(cache, two, TEXT[:500])


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 16), (8, 8)])
@pytest.mark.parametrize("num_tokens", [0, 1, 64, 300, 500])
def test_a_spilled_sequence_comes_back_bit_for_bit(key_bits, value_bits, num_tokens):
    cache, tier = make_cache(make_config(key_bits, value_bits), 600), DictTier()
    one = cache.new_sequence()
    query, key, value = vectors(510, 4, seed=1), vectors(510, seed=2), vectors(510, seed=3)
    if num_tokens:
        run(cache, one, query[:num_tokens], key[:num_tokens], value[:num_tokens], 500)
    before = [stored(cache, one, layer_index) for layer_index in range(2)]
    twin = make_cache(make_config(key_bits, value_bits), 600)
    handle = cache.spill(one, tier)
    assert cache.sequence_ids == []
    assert cache._packed.num_free_pages == cache._packed.num_pages
    two, three = cache.restore(handle, tier), twin.restore(handle, tier)
    cache.check_integrity()
    assert all(torch.equal(stored(cache, two, layer), before[layer]) for layer in range(2))
    own = [x[num_tokens : num_tokens + 10] for x in (query, key, value)]
    assert torch.equal(run(cache, two, *own, 5), run(twin, three, *own, 5))


def test_a_sequence_that_does_not_fit_stays_in_its_tier():
    cache, tier = without_attention(make_cache(make_config(), 600)), DictTier()
    one = cache.new_sequence()
    append(cache, [one], [TEXT[:500]])
    handle = cache.spill(one, tier)
    two = cache.new_sequence()
    append(cache, [two], [TEXT[:600]])
    with pytest.raises(CacheFullError):
        cache.restore(handle, tier)
    assert cache.sequence_ids == [two]
    cache.check_integrity()
    cache.free(two)
    assert_holds(cache, cache.restore(handle, tier), TEXT[:500])


def test_spilling_leaves_shared_pages_to_the_others():
    cache, tier = without_attention(make_cache(make_config(), 600, num_sequences=2)), DictTier()
    one = cache.new_sequence()
    append(cache, [one], [TEXT[:500]])
    two = cache.fork(one)
    handle = cache.spill(one, tier)
    assert_holds(cache, two, TEXT[:500])
    assert_holds(cache, cache.restore(handle, tier), TEXT[:500])
    cache.check_integrity()


def test_restoring_refuses_other_formats_and_damaged_metadata():
    cache, tier = without_attention(make_cache(make_config(8, 8), 600)), DictTier()
    one = cache.new_sequence()
    append(cache, [one], [TEXT[:500]])
    handle = cache.spill(one, tier)
    with pytest.raises(DataError, match="another format"):
        make_cache(make_config(8, 4), 600).restore(handle, tier)
    pages, metadata = tier.kept[handle]
    for damaged in ((pages[1:], metadata), (pages, {"length": 3}), (pages.to(torch.int16), metadata)):
        tier.kept[handle] = damaged
        with pytest.raises(DataError):
            cache.restore(handle, tier)
        cache.check_integrity()
    assert cache.sequence_ids == []


def test_settings_that_cannot_work_are_refused():
    config = make_config()
    with pytest.raises(ConfigError, match="num_sequences is 0"):
        PagedKVCache(config, 10**7, num_sequences=0)
    with pytest.raises(ConfigError, match="1 frames for 2 layers"):
        PagedKVCache(config, 10**7, frames=plain_frames(config)[:1])


def test_unknown_sequences_are_named():
    cache = make_cache(make_config(), 100)
    sequence_id = cache.new_sequence()
    cache.free(sequence_id)
    for call in (cache.free, cache.length, cache.fork, lambda s: cache.truncate(s, 0)):
        with pytest.raises(ConfigError, match=f"there is no sequence {sequence_id}"):
            call(sequence_id)


def test_the_cache_of_one_sequence_does_what_the_shared_one_does():
    config = make_config(8, 4)
    budget_bytes = bytes_for_tokens(config, 500)
    one, shared = QuantizedKVCache(config, budget_bytes), PagedKVCache(config, budget_bytes)
    sequence_id = shared.new_sequence()
    assert one.allocated_bytes == shared.allocated_bytes == budget_bytes
    for start in range(0, 500, 125):
        tensors = [vectors(125, heads, seed=start + heads) for heads in (4, 2)]
        for layer_index in range(2):
            assert one.length == start
            output = one.extend(layer_index, tensors[0], tensors[1], tensors[1])
            assert torch.equal(output, shared.extend(layer_index, [sequence_id], tensors[0], tensors[1], tensors[1]))
    one.truncate(400)
    assert one.length == 400
    one.check_integrity()
    one.free()
    assert one.length == 0
    one.check_integrity()


@pytest.mark.parametrize("sizes", [{"num_window_tokens": 20}, {"num_sink_tokens": 0, "num_window_tokens": 0}])
@pytest.mark.parametrize(("precision", "seed"), [("float", 2), ("ternary", 5)])
def test_greedy_text_through_16_bit_pages_is_that_of_the_plain_model(sizes, precision, seed):
    assert_same_text(sizes, precision, seed, plain_cache=None)


def test_greedy_text_through_16_bit_pages_is_that_of_float16_keys_and_values():
    # rounding keys and values to float16 tips an int8 value of this model, in pages as in the plainest cache
    assert_same_text({"num_window_tokens": 20}, "ternary", 2, plain_cache=HalfCache(2))


def assert_same_text(sizes, precision, seed, plain_cache):
    model = tiny_model(seed=seed, precision=precision, head_dim=16, num_kv_heads=2, num_heads=6)
    config = make_config(**sizes)
    cache = QuantizedKVCache(config, bytes_for_tokens(config, 180))
    prompt = random_token_ids(150).tolist()
    plain = generate(model, prompt, 30, cache=plain_cache)
    assert len(set(plain)) > 2
    assert generate(model, prompt, 30, cache=cache) == plain
    assert cache.length == 179
    cache.check_integrity()
