import pytest
import torch
from factories import ListCache, tiny_model

from moe_bitnet.errors import ConfigError
from moe_bitnet.generation import generate

PROMPT = [1, 30, 7]


@pytest.fixture(scope="module", params=["ternary", "float"])
def model(request):
    return tiny_model(precision=request.param)


def test_greedy_takes_the_best_token_of_the_whole_prefix_at_each_step(model):
    new = generate(model, PROMPT, 9)
    assert len(new) == 9
    token_ids = list(PROMPT)
    with torch.no_grad():
        for token in new:
            assert token == int(model(torch.tensor([token_ids])).logits[0, -1].argmax())
            token_ids.append(token)
    assert len(set(new)) > 1, "the model says more than one thing, so that the test can fail"


@pytest.mark.parametrize("prompt", [[0], PROMPT, list(range(33))])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cache_changes_nothing(model, prompt, temperature):
    plain = generate(model, prompt, 9, temperature=temperature)
    cache = ListCache(2)
    assert generate(model, prompt, 9, cache=cache, temperature=temperature) == plain
    assert cache.length == len(prompt) + 8, "the last token was not computed"


def test_a_cache_computes_each_token_once(model):
    lengths = []
    handle = model.embedding.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    generate(model, PROMPT, 4, cache=ListCache(2))
    handle.remove()
    assert lengths == [3, 1, 1, 1]


def test_the_stop_token_ends_the_text_and_is_not_returned(model):
    new = generate(model, PROMPT, 9, temperature=2.0, seed=5)
    for stop_id in set(new):
        assert generate(model, PROMPT, 9, temperature=2.0, seed=5, stop_id=stop_id) == new[: new.index(stop_id)]
    assert len(set(new)) > 2


def test_on_token_gets_each_token_in_order_as_soon_as_it_is_known(model):
    events = []
    handle = model.embedding.register_forward_pre_hook(lambda *_: events.append("compute"))
    new = generate(model, PROMPT, 3, on_token=events.append)
    handle.remove()
    assert events == ["compute", new[0], "compute", new[1], "compute", new[2]]


def test_on_token_does_not_get_the_stop_token(model):
    seen = []
    first = generate(model, PROMPT, 1)[0]
    assert generate(model, PROMPT, 5, stop_id=first, on_token=seen.append) == []
    assert seen == []


def test_no_new_tokens_compute_nothing(model):
    assert generate(model, PROMPT, 0) == []


def test_greedy_does_not_depend_on_the_seed(model):
    assert generate(model, PROMPT, 9, seed=1) == generate(model, PROMPT, 9, seed=2)


def test_a_seed_repeats_and_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    first = generate(model, PROMPT, 9, temperature=2.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(model, PROMPT, 9, temperature=2.0, seed=1) == first
    assert generate(model, PROMPT, 9, temperature=2.0, seed=2) != first


def test_a_tiny_nucleus_is_greedy(model):
    assert generate(model, PROMPT, 9, temperature=1.0, top_p=1e-6) == generate(model, PROMPT, 9)


def test_the_prompt_stays_as_it_is(model):
    prompt = list(PROMPT)
    generate(model, prompt, 3)
    assert prompt == PROMPT
    assert generate(model, tuple(PROMPT), 3) == generate(model, PROMPT, 3)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(model, [], 3)


def test_a_used_cache_is_refused(model):
    cache = ListCache(2)
    generate(model, PROMPT, 3, cache=cache)
    with pytest.raises(ConfigError, match="holds 5 tokens already"):
        generate(model, PROMPT, 3, cache=cache)


def test_no_gradient_is_recorded(model):
    cache = ListCache(2)
    generate(model, PROMPT, 2, cache=cache)
    assert not cache.keys[0][0].requires_grad
