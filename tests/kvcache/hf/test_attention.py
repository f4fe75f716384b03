import pytest
import torch
from tiny_models import padded_batch, tiny_model
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from kvcache.hf import attention, paged_cache
from kvcache.hf.attention import PagedLength, UnsupportedMask, check_plain_attention, paged_mask
from kvcache.hf.calibrate import cache_argument
from moe_bitnet.errors import ConfigError

ARGUMENTS = {"batch_size": 2, "q_length": 3, "q_offset": 4, "mask_function": causal_mask_function}


def test_a_paged_cache_gets_the_padding_mask_as_it_is():
    padding = torch.ones(2, 7, dtype=torch.bool)
    assert paged_mask(kv_length=PagedLength(7), attention_mask=padding, **ARGUMENTS) is padding
    assert paged_mask(kv_length=PagedLength(7), **ARGUMENTS) is None


def test_other_caches_get_the_mask_of_sdpa():
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :2] = False
    mask = paged_mask(kv_length=7, attention_mask=padding, **ARGUMENTS)
    assert torch.equal(mask, sdpa_mask(kv_length=7, attention_mask=padding, **ARGUMENTS))


def test_other_patterns_are_refused_where_a_layer_uses_them():
    arguments = {**ARGUMENTS, "mask_function": sliding_window_causal_mask_function(4)}
    mask = paged_mask(kv_length=PagedLength(7), **arguments)
    assert isinstance(mask, UnsupportedMask)
    with pytest.raises(ConfigError, match="other than causal"):
        check_plain_attention(torch.nn.Identity(), mask, {})


@pytest.mark.parametrize(
    "argument",
    [
        {"dropout": 0.1},
        {"sliding_window": 4},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1, 1, 2, 2)},
        {"is_causal": False},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_that_change_the_formula_are_refused(argument):
    module = torch.nn.Identity().eval()
    check_plain_attention(module, None, dict.fromkeys(argument))
    with pytest.raises(ConfigError, match=next(iter(argument))):
        check_plain_attention(module, None, argument)


def test_no_mask_of_queries_times_keys_is_made(monkeypatch):
    model = tiny_model()
    token_ids, mask = padded_batch(30, 20)
    cache = paged_cache(model, 1 << 24, batch_size=2)

    def fail(**_):
        raise AssertionError("a four-dimensional mask was made")

    monkeypatch.setattr(attention, "sdpa_mask", fail)
    with torch.no_grad():
        model(token_ids, attention_mask=mask, **{cache_argument(model): cache})
