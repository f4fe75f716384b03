import pytest
import torch
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache

from kvcache.hf import calibrate, paged_cache
from kvcache.hf.calibrate import cache_argument
from moe_bitnet.errors import ShapeError


def last_logits(model, token_ids, cache):
    with torch.no_grad():
        arguments = {cache_argument(model): cache, "use_cache": True}
        model(token_ids[:, :-20], **arguments)
        return model(token_ids[:, -20:], **arguments).logits


def test_moments_are_those_of_the_cached_keys_and_values():
    model = tiny_model()
    token_ids = random_tokens(2, 100)
    moments = calibrate(model, token_ids, chunk_size=33)
    assert moments.count.tolist() == [200, 200]
    assert model.config._attn_implementation == "sdpa"
    cache = DynamicCache()
    with torch.no_grad():
        model(token_ids, use_cache=True, **{cache_argument(model): cache})
    for layer_index, layer in enumerate(cache.layers):
        key, value = (x.double().transpose(0, 1).flatten(1, 2) for x in (layer.keys, layer.values))  # [G, T, D]
        torch.testing.assert_close(moments.key_sum[layer_index], key.sum(dim=1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments.value_square[layer_index], value.mT @ value, rtol=1e-3, atol=1e-3)


def test_one_sequence_needs_no_batch():
    model = tiny_model()
    token_ids = random_tokens(80)
    alone, batched = calibrate(model, token_ids), calibrate(model, token_ids.unsqueeze(0))
    assert torch.equal(alone.query_square, batched.query_square)


def test_old_tokens_are_counted_by_attention_whatever_the_chunks():
    model = tiny_model()
    token_ids = random_tokens(2, 400)
    whole, chunked = calibrate(model, token_ids), calibrate(model, token_ids, chunk_size=100)
    assert whole.attended_weight.min() > 0
    torch.testing.assert_close(chunked.attended_value_square, whole.attended_value_square, rtol=1e-3, atol=1e-5)


def test_a_calibrated_cache_is_close():
    model = tiny_model("qwen2")
    moments = calibrate(model, random_tokens(200, seed=1))
    token_ids = random_tokens(1, 84)
    expected = last_logits(model, token_ids, DynamicCache())
    cache = paged_cache(model, 1 << 24, calibration=moments, num_sink_tokens=0, num_window_tokens=0)
    error = (last_logits(model, token_ids, cache) - expected).square().mean().sqrt()
    assert 0 < error < 0.03 * expected.std()


@pytest.mark.parametrize("shape", [(0,), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match="token_ids"):
        calibrate(tiny_model(), torch.zeros(shape, dtype=torch.int64))
