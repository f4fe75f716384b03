import pytest
import torch

from kvcache.recent import RecentTokens


def make_recent(num_sink_tokens=2, num_slots=7):
    return RecentTokens(num_layers=2, num_kv_heads=3, head_dim=4, num_sink_tokens=num_sink_tokens, num_slots=num_slots)


def tokens(start, stop):
    """Keys and values of tokens whose every element is the token's own number."""
    return torch.arange(start, stop, dtype=torch.float16)[None, None, :, None].expand(2, 3, -1, 4)


def numbers(key_value):
    assert (key_value == key_value[:1, :1, :, :1]).all()
    return key_value[0, 0, :, 0].int().tolist()


def test_first_tokens_are_sinks_and_the_rest_is_window():
    recent = make_recent()
    assert recent.append(0, tokens(0, 5)) == 5
    assert numbers(recent.sinks(0)) == [0, 1]
    assert numbers(recent.window(0)) == [2, 3, 4]


def test_append_stores_only_what_fits():
    recent = make_recent()
    assert recent.append(0, tokens(0, 9)) == 7
    assert recent.append(0, tokens(7, 9)) == 0
    assert numbers(recent.window(0)) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("num_taken", [1, 2, 4, 5])
def test_oldest_leave_the_window_and_the_rest_moves_up(num_taken):
    recent = make_recent()
    recent.append(0, tokens(0, 7))
    assert numbers(recent.take_oldest(0, num_taken)) == list(range(2, 2 + num_taken))
    assert numbers(recent.window(0)) == list(range(2 + num_taken, 7))
    assert numbers(recent.sinks(0)) == [0, 1]


def test_taking_more_than_the_window_is_a_bug():
    recent = make_recent()
    recent.append(0, tokens(0, 4))
    with pytest.raises(AssertionError, match="fewer"):
        recent.take_oldest(0, 3)


def test_layers_are_independent():
    recent = make_recent()
    recent.append(1, tokens(0, 3))
    assert recent.num_held(0) == 0
    assert recent.num_held(1) == 3


def test_sinks_may_be_absent():
    recent = make_recent(num_sink_tokens=0)
    recent.append(0, tokens(0, 3))
    assert recent.sinks(0).shape == (2, 3, 0, 4)
    assert numbers(recent.window(0)) == [0, 1, 2]


def test_clear_forgets_all_tokens():
    recent = make_recent()
    recent.append(0, tokens(0, 3))
    recent.clear()
    assert recent.num_held(0) == 0
    recent.check_integrity()


def test_allocated_bytes_are_fp16_slots():
    assert make_recent().allocated_bytes == 2 * 2 * 3 * 7 * 4 * 2
