import copy
import gc

import pytest
import torch
from tiny_models import padded_batch, random_tokens, tiny_model
from transformers import DynamicCache

from kvcache.hf import paged_cache
from kvcache.hf.calibrate import cache_argument
from kvcache.hf.support import TESTED_MODEL_TYPES
from moe_bitnet.errors import CacheFullError, ConfigError, ShapeError

BUDGET_BYTES = 1 << 23
# Long enough that pages are sealed: token 128 + 16 seals the second page, behind the sinks.
PROMPT_LENGTH = 150
EXACT = {"key_bits": 16, "value_bits": 16, "num_window_tokens": 16}


def generate(model, token_ids, cache=None, **settings):
    """Generate greedily, with a cache or as the plain model does."""
    arguments = {} if cache is None else {cache_argument(model): cache}
    return model.generate(token_ids, **{"max_new_tokens": 12, "do_sample": False, **arguments, **settings})


def logits_of(model, token_ids, cache, mask=None):
    """Return the logits of one forward pass."""
    with torch.no_grad():
        return model(token_ids, attention_mask=mask, use_cache=True, **{cache_argument(model): cache}).logits


@pytest.fixture
def model():
    return tiny_model()


def assert_nothing_is_held(cache):
    assert cache.store.sequence_ids == []
    cache.store.check_integrity()


@pytest.mark.parametrize("model_type", sorted(TESTED_MODEL_TYPES))
def test_16_bits_give_the_plain_models_tokens(model_type):
    model = tiny_model(model_type)
    token_ids, mask = padded_batch(PROMPT_LENGTH, 70)
    expected = generate(model, token_ids, attention_mask=mask)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT)
    assert torch.equal(generate(model, token_ids, cache, attention_mask=mask), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert cache.store.num_free_pages < paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT).store.num_free_pages


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_16_bits_give_the_plain_models_tokens_at_any_head_dim(head_dim, num_kv_heads):
    model = tiny_model("qwen3", head_dim=head_dim, num_key_value_heads=num_kv_heads)
    token_ids = random_tokens(1, PROMPT_LENGTH)
    expected = generate(model, token_ids)
    assert torch.equal(generate(model, token_ids, paged_cache(model, BUDGET_BYTES, **EXACT)), expected)


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"num_beams": 3}, (PROMPT_LENGTH,)),
        ({"num_beams": 3, "num_return_sequences": 3}, (PROMPT_LENGTH, 70)),
        ({"prefill_chunk_size": 33}, (PROMPT_LENGTH,)),
        ({"prefill_chunk_size": 33}, (PROMPT_LENGTH, 17, 70)),
        ({"prompt_lookup_num_tokens": 3}, (PROMPT_LENGTH,)),
    ],
    ids=str,
)
def test_modes_of_generate_give_the_plain_models_tokens(model, settings, lengths):
    token_ids, mask = padded_batch(*lengths)
    expected = generate(model, token_ids, attention_mask=mask, **settings)
    num_beams = settings.get("num_beams", 1)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=len(lengths), num_beams=num_beams, **EXACT)
    assert torch.equal(generate(model, token_ids, cache, attention_mask=mask, **settings), expected)
    cache.store.check_integrity()


def test_sampled_return_sequences_differ_and_keep_the_prompt(model):
    cache = paged_cache(model, BUDGET_BYTES, batch_size=4, **EXACT)
    token_ids = random_tokens(1, PROMPT_LENGTH)
    output = generate(model, token_ids, cache, do_sample=True, num_return_sequences=4)
    assert output.shape[0] == cache.batch_size == 4
    assert len({tuple(row) for row in output.tolist()}) > 1


def test_few_bits_stay_close_in_logits(model):
    token_ids, mask = padded_batch(84, 70)
    expected = logits_of(model, token_ids, DynamicCache(), mask)
    errors = {}
    for bits in (16, 8, 4):
        widths = {"key_bits": bits, "value_bits": bits, "num_sink_tokens": 0, "num_window_tokens": 0}
        cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **widths)
        logits_of(model, token_ids[:, :80], cache, mask[:, :80])
        logits = logits_of(model, token_ids[:, 80:], cache, mask)
        errors[bits] = float((logits - expected[:, 80:]).square().mean().sqrt() / expected.std())
    assert errors[16] < errors[8] / 4 < errors[4] / 4
    assert errors[8] < 0.03


def test_padding_takes_no_memory(model):
    token_ids, mask = padded_batch(PROMPT_LENGTH, 17)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT)
    logits_of(model, token_ids, cache, mask)
    assert [cache.store.length(sequence_id) for sequence_id in cache.store.sequence_ids] == [PROMPT_LENGTH, 17]
    assert cache.get_seq_length() == PROMPT_LENGTH


def test_right_padding_is_skipped_too(model):
    token_ids = random_tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 25:] = 0
    cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT)
    logits = logits_of(model, token_ids, cache, mask)
    expected = logits_of(model, token_ids, DynamicCache(), mask)
    torch.testing.assert_close(logits[1, :25], expected[1, :25], rtol=0, atol=1e-2)


def test_a_conversation_goes_on_from_the_cache(model):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    first = generate(model, random_tokens(1, PROMPT_LENGTH), cache)
    prompt = torch.cat((first, random_tokens(1, 30, seed=1)), dim=1)
    expected = generate(model, prompt)
    assert torch.equal(generate(model, prompt, cache), expected)


@pytest.mark.parametrize("lengths", [(PROMPT_LENGTH,), (PROMPT_LENGTH, 17)])
def test_crop_goes_back_and_on(model, lengths):
    token_ids, mask = padded_batch(*lengths)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=len(lengths), **EXACT)
    before = logits_of(model, token_ids, cache, mask)
    cache.crop(0)
    cache.crop(-15)
    assert cache.get_seq_length() == PROMPT_LENGTH - 15
    after = logits_of(model, token_ids[:, -15:], cache, mask)
    torch.testing.assert_close(after, before[:, -15:], rtol=0, atol=1e-3)
    with pytest.raises(ConfigError, match="minus the number"):
        cache.crop(3)


def test_a_crop_into_a_packed_page_changes_nothing(model):
    token_ids, mask = padded_batch(PROMPT_LENGTH, 60)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT)
    logits_of(model, token_ids, cache, mask)
    with pytest.raises(ConfigError, match="packed page"):
        cache.crop(-50)
    assert cache.get_seq_length() == PROMPT_LENGTH
    assert [cache.store.length(sequence_id) for sequence_id in cache.store.sequence_ids] == [PROMPT_LENGTH, 60]
    cache.store.check_integrity()


def test_reset_takes_another_batch_size(model):
    cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT)
    generate(model, random_tokens(2, PROMPT_LENGTH), cache)
    with pytest.raises(ShapeError, match=r"3 rows.*reset"):
        logits_of(model, random_tokens(3, 5), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_nothing_is_held(cache)
    token_ids = random_tokens(1, PROMPT_LENGTH, seed=1)
    assert torch.equal(generate(model, token_ids, cache), generate(model, token_ids))


def test_rows_are_repeated_and_selected(model):
    token_ids, mask = padded_batch(PROMPT_LENGTH, 70)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=4, **EXACT)
    logits_of(model, token_ids, cache, mask)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([3, 0, 3]))
    cache.batch_select_indices(torch.tensor([True, True, False]))
    assert cache.batch_size == 2
    cache.store.check_integrity()
    next_ids = random_tokens(2, 3, seed=1)
    swapped, swapped_mask = torch.cat((token_ids.flip(0), next_ids), dim=1), torch.cat((mask.flip(0), mask[:, :3]), 1)
    swapped_mask[:, -3:] = 1
    expected = logits_of(model, swapped, DynamicCache(), swapped_mask)[:, -3:]
    torch.testing.assert_close(logits_of(model, next_ids, cache, swapped_mask), expected, rtol=0, atol=1e-2)


def test_deepcopies_share_the_prompt(model):
    token_ids = random_tokens(1, PROMPT_LENGTH)
    prompt_cache = paged_cache(model, BUDGET_BYTES, batch_size=3, **EXACT)
    logits_of(model, token_ids[:, :-1], prompt_cache)
    num_free_pages = prompt_cache.store.num_free_pages
    expected = generate(model, token_ids)
    for _ in range(2):
        cache = copy.deepcopy(prompt_cache)
        assert cache.store is prompt_cache.store
        assert cache.store.num_free_pages == num_free_pages
        assert torch.equal(generate(model, token_ids, cache), expected)
    assert prompt_cache.get_seq_length() == PROMPT_LENGTH - 1


def test_a_collected_cache_gives_its_sequences_back(model):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    logits_of(model, random_tokens(1, 20), cache)
    store = cache.store
    del cache
    gc.collect()
    assert store.sequence_ids == []
    store.check_integrity()


def test_a_full_cache_stays_usable(model):
    token_ids = random_tokens(1, PROMPT_LENGTH)
    config = paged_cache(model, BUDGET_BYTES, **EXACT).config
    cache = paged_cache(model, config.exact_pages_per_sequence * config.exact_page_bytes + config.page_bytes, **EXACT)
    with pytest.raises(CacheFullError):
        generate(model, token_ids, cache, max_new_tokens=80)
    length = cache.get_seq_length()
    assert length > PROMPT_LENGTH
    cache.store.check_integrity()
    cache.crop(-3)
    assert cache.get_seq_length() == length - 3
    with pytest.raises(CacheFullError):
        logits_of(model, random_tokens(1, 100), cache)
    assert cache.get_seq_length() == length - 3
    cache.reset()
    assert torch.equal(generate(model, token_ids, cache), generate(model, token_ids))


def test_a_step_that_broke_off_is_taken_back(model, monkeypatch):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    token_ids = random_tokens(1, PROMPT_LENGTH)
    logits_of(model, token_ids[:, :130], cache)
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", lambda hidden_states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, token_ids[:, :7], cache)
    monkeypatch.undo()
    assert cache.get_seq_length() == 130
    after = logits_of(model, token_ids[:, 130:], cache)
    expected = logits_of(model, token_ids, DynamicCache())[:, 130:]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-2)
    assert cache.get_seq_length() == PROMPT_LENGTH
    cache.store.check_integrity()


def test_other_caches_and_none_go_the_usual_way(model):
    token_ids, mask = padded_batch(PROMPT_LENGTH, 70)
    expected = generate(model, token_ids, attention_mask=mask)
    expected_logits = model(token_ids, attention_mask=mask).logits
    paged_cache(model, BUDGET_BYTES, **EXACT)
    assert torch.equal(generate(model, token_ids, attention_mask=mask), expected)
    assert torch.equal(generate(model, token_ids, DynamicCache(), attention_mask=mask), expected)
    assert torch.equal(generate(model, token_ids, attention_mask=mask, use_cache=False), expected)
    assert torch.equal(model(token_ids, attention_mask=mask).logits, expected_logits)
    loss = model(token_ids, attention_mask=mask, labels=token_ids, use_cache=False).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_model_with_other_attention_is_refused(model):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"'sdpa'.*set_attn_implementation"):
        generate(model, random_tokens(1, 5), cache)


def test_attention_that_never_comes_is_noticed(model):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)
    with pytest.raises(ConfigError, match="did not attend"):
        cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 1)
    cache.reset()
    logits_of(model, random_tokens(1, 5), cache)


def test_keys_of_another_model_are_refused(model):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    for layer_index, shape in ((0, (1, 4, 3, 64)), (0, (1, 2, 3, 80)), (2, (1, 2, 3, 64))):
        with pytest.raises(ShapeError, match="made for 2 layers"):
            cache.update(torch.zeros(shape), torch.zeros(shape), layer_index)


def test_masks_that_change_the_past_are_refused(model):
    token_ids, mask = padded_batch(20, 10)
    cache = paged_cache(model, BUDGET_BYTES, batch_size=2, **EXACT)
    logits_of(model, token_ids, cache, mask)
    new_mask = torch.ones(2, 21, dtype=torch.int64)
    with pytest.raises(ConfigError, match="shows or hides"):
        logits_of(model, token_ids[:, :1], cache, new_mask)
    with pytest.raises(ShapeError, match=r"\[2, 21\]"):
        logits_of(model, token_ids[:, :1], cache, new_mask[:, :1])
    with pytest.raises(ConfigError, match="other than causal"):
        logits_of(model, token_ids[:, :1], cache, torch.ones(2, 1, 1, 21, dtype=torch.bool))
    new_mask[:, :20] = mask
    logits_of(model, token_ids[:, :1], cache, new_mask)
    assert cache.get_seq_length() == 21


def test_training_through_the_cache_is_refused(model):
    cache = paged_cache(model, BUDGET_BYTES, **EXACT)
    model.train()
    with pytest.raises(ConfigError, match="gradients"):
        model(random_tokens(1, 5), use_cache=True, **{cache_argument(model): cache})


def test_the_cache_stays_inside_its_budget(model):
    cache = paged_cache(model, 1 << 20, key_bits=4, value_bits=2, layer_bits=((0, 8, 8),))
    assert cache.allocated_bytes <= 1 << 20
    assert cache.config.bits_of_layer(0) == (8, 8)
    with pytest.raises(ConfigError, match="budget_bytes"):
        paged_cache(model, 1000)


def test_half_precision_models_work(model):
    model = model.to(torch.bfloat16)
    token_ids = random_tokens(1, PROMPT_LENGTH)
    expected = logits_of(model, token_ids, DynamicCache())
    logits = logits_of(model, token_ids, paged_cache(model, BUDGET_BYTES, **EXACT))
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
