import pytest
import torch
from tiny_models import random_tokens, tiny_model
from transformers import DynamicCache

from kvcache.hf.evaluation import (
    CacheFormat,
    TokenizedNeedle,
    ask,
    compare_caches,
    evaluate_caches,
    forward,
    make_cache,
    parse_format,
    text_with_needles,
    tokenize_needles,
)
from kvcache.quality import Needle
from moe_bitnet.errors import ConfigError, ShapeError

NUM_TOKENS = 400  # two pages are sealed behind the sinks


def cache_of(model, name):
    return make_cache(model, parse_format(name), NUM_TOKENS + 20, None)


def needle(seed):
    return TokenizedNeedle(*(random_tokens(length, seed=seed + part) for part, length in enumerate((9, 4, 3))))


def test_formats_are_read():
    assert parse_format("K8V4") == parse_format(" k8v4 ") == CacheFormat(8, 4)
    assert str(CacheFormat(16, 2)) == "K16V2"
    for text in ("", "K3V4", "8,4", "K8"):
        with pytest.raises(ConfigError, match="K8V4"):
            parse_format(text)


def test_16_bits_are_all_but_the_plain_cache_and_fewer_bits_are_worse():
    model = tiny_model()
    token_ids = random_tokens(NUM_TOKENS)
    others = {name: cache_of(model, name) for name in ("K16V16", "K8V8", "K2V2")}
    comparisons = compare_caches(model, token_ids, DynamicCache(), others, num_skipped=256)
    klds = [comparison.result().kld_mean for comparison in comparisons.values()]
    assert 0 <= klds[0] < klds[1] < klds[2]
    assert klds[0] < 1e-5
    assert comparisons["K8V8"].result().num_tokens == NUM_TOKENS - 1 - 256


def test_chunks_within_a_page_see_the_pages_of_decoding():
    model = tiny_model()
    token_ids = random_tokens(NUM_TOKENS)
    means = []
    for chunk_len in (64, 16):
        others = {"K4V4": cache_of(model, "K4V4")}
        comparisons = compare_caches(model, token_ids, cache_of(model, "K16V16"), others, chunk_len=chunk_len)
        means.append(comparisons["K4V4"].kld_mean)
    assert means[0] == pytest.approx(means[1], rel=1e-2)
    with pytest.raises(ConfigError, match="chunk_len is 48"):
        compare_caches(model, token_ids, DynamicCache(), {}, chunk_len=48)
    with pytest.raises(ShapeError, match="more than are skipped"):
        compare_caches(model, token_ids, DynamicCache(), {}, num_skipped=NUM_TOKENS)


def test_progress_is_told():
    model, told = tiny_model(), []
    others = {"K8V8": cache_of(model, "K8V8")}
    compare_caches(
        model,
        random_tokens(130),
        DynamicCache(),
        others,
        num_skipped=100,
        on_chunk=lambda done, comparisons: told.append((done, comparisons["K8V8"].kld_mean is None)),
    )
    assert told == [(64, True), (128, False), (129, False)]


@pytest.mark.parametrize("make", [lambda model: DynamicCache(), lambda model: cache_of(model, "K4V4")])
def test_asking_leaves_the_cache_as_it_is(make):
    model, cache = tiny_model(), None
    cache = make(model)
    for chunk in random_tokens(300).split(64):
        with torch.inference_mode():
            forward(model, chunk, cache)
    first, again = ask(model, cache, needle(1)), ask(model, cache, needle(1))
    assert first == again
    assert first.log_probability < 0
    assert cache.get_seq_length() == 300
    assert ask(model, cache, needle(5)) != first


def test_an_answer_that_the_model_gives_by_itself_is_found():
    model, cache = tiny_model(), DynamicCache()
    with torch.inference_mode():
        forward(model, random_tokens(20), cache)
        question_ids = random_tokens(4, seed=3)
        answer_ids = forward(model, question_ids, DynamicCache(), num_logits=1).argmax(-1)
    found = ask(model, DynamicCache(), TokenizedNeedle(question_ids, question_ids, answer_ids))
    assert found.is_found


def test_needles_are_hidden_and_asked_for():
    model = tiny_model()
    needles = [needle(1), needle(5)]
    token_ids = text_with_needles(random_tokens(NUM_TOKENS), needles, NUM_TOKENS)
    assert len(token_ids) == NUM_TOKENS
    others = {"K16V16": cache_of(model, "K16V16")}
    quality = evaluate_caches(model, token_ids, needles, DynamicCache(), others, num_skipped=256)["K16V16"]
    assert quality.retrieval.num_needles == 2
    assert quality.retrieval.num_lost == quality.retrieval.num_gained == 0
    assert quality.retrieval.log_probability_change == pytest.approx(0, abs=1e-2)
    with pytest.raises(ShapeError, match="400 tokens"):
        text_with_needles(random_tokens(NUM_TOKENS), needles, 500)


def test_needles_are_tokenized_part_by_part():
    (tokenized,) = tokenize_needles([Needle("abc", "ab", "c")], lambda text: torch.tensor([ord(c) for c in text]))
    assert tokenized.question_ids.tolist() + tokenized.answer_ids.tolist() == tokenized.sentence_ids.tolist()
