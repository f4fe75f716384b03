import pytest
import torch
from real_model import real_model
from transformers import DynamicCache

from kvcache.hf import calibrate, paged_cache
from kvcache.hf.calibrate import cache_argument

PROMPT = (
    "A lighthouse is a tower that sends out light at night. Sailors know each of them by its colour and rhythm: one "
    "flashes white every ten seconds, the next red and white in turn. Before there were lamps, keepers burned wood or "
    "coal on top of a hill, and later oil behind a lens that turned on a bath of mercury. Today most of them work by "
    "themselves. The keeper of the last one, who had lived there for forty years, said that what he missed most was"
)
OTHER_TEXT = "The recipe asks for two cups of flour, a spoon of salt, and patience. " * 3 + (
    "In 1969 the first message between two computers was sent; the machine crashed after two letters. When a river "
    "meets the sea it slows down, drops its sand, and builds islands where birds rest on their way to the south."
)

pytestmark = pytest.mark.slow


def last_log_probs(model, token_ids, cache):
    """Return log probabilities at the last 30 tokens, the rest of which lie in the cache."""
    arguments = {cache_argument(model): cache, "use_cache": True}
    with torch.no_grad():
        model(token_ids[:, :-30], logits_to_keep=1, **arguments)
        return model(token_ids[:, -30:], **arguments).logits.log_softmax(dim=-1)


def divergence(expected, actual):
    return float((expected.exp() * (expected - actual)).sum(dim=-1).mean())


def test_16_bits_give_the_plain_models_tokens():
    model, tokenizer = real_model()
    token_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    settings = {"max_new_tokens": 15, "do_sample": False}
    expected = model.generate(token_ids, **settings)
    cache = paged_cache(model, 1 << 26, key_bits=16, value_bits=16, num_sink_tokens=0, num_window_tokens=0)
    assert torch.equal(model.generate(token_ids, **{cache_argument(model): cache}, **settings), expected)


def test_divergence_falls_with_bits_and_with_calibration():
    model, tokenizer = real_model()
    token_ids, other_ids = (tokenizer(text, return_tensors="pt").input_ids for text in (PROMPT, OTHER_TEXT))
    expected = last_log_probs(model, token_ids, DynamicCache())
    moments = calibrate(model, other_ids)
    divergences = []
    for bits, calibration in ((2, None), (2, moments), (8, None)):
        widths = {"key_bits": bits, "value_bits": max(bits, 4), "num_sink_tokens": 0, "num_window_tokens": 0}
        cache = paged_cache(model, 1 << 26, calibration=calibration, **widths)
        divergences.append(divergence(expected, last_log_probs(model, token_ids, cache)))
        cache.reset()
    plain_2_bits, calibrated_2_bits, plain_8_bits = divergences
    assert 0 < plain_8_bits < calibrated_2_bits < plain_2_bits, divergences
    assert plain_8_bits < 0.01
