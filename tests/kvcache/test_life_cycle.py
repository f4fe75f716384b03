"""Sequences come, grow, share, shrink, leave and come back in any order; no page and no bit is ever lost."""

import pytest
import torch
from cache_factories import DictTier, append, keys_of, make_cache, make_config, packed_layer, stored, without_attention
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.cache import PagedKVCache
from kvcache.page import PAGE_SIZE
from moe_bitnet.errors import CacheFullError, ConfigError

TEXT = [position * position % 31 for position in range(4000)]  # all sequences begin like this, so that some can share


class LifeCycle(RuleBasedStateMachine):
    """A 16-bit cache, whose pages can be compared with the tokens, beside a model that only knows lists of tokens."""

    @initialize(
        num_sequences=st.integers(1, 3),
        num_packed=st.integers(0, 7),
        num_sinks=st.sampled_from([0, 64]),
        num_window=st.sampled_from([0, 1, 20, 64, 130]),
    )
    def make(self, num_sequences, num_packed, num_sinks, num_window):
        config = make_config(num_sink_tokens=num_sinks, num_window_tokens=num_window)
        exact_bytes = num_sequences * config.exact_pages_per_sequence * config.exact_page_bytes
        budget_bytes = exact_bytes + num_packed * config.page_bytes
        self.cache = without_attention(PagedKVCache(config, budget_bytes, num_sequences=num_sequences))
        self.tokens = {}
        self.sealed = {}
        self.tier = DictTier()
        self.spilled = {}
        self.num_distinct = 31

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.tokens)))

    def next_tokens(self, sequence_id, count, data):
        """The text goes on, or leaves it with tokens that no other sequence has."""
        start = len(self.tokens[sequence_id])
        is_own = data.draw(st.booleans())
        return [31 + sequence_id % 33] * count if is_own else TEXT[start : start + count]

    @precondition(lambda self: len(self.tokens) < 5)
    @rule()
    def start(self):
        self.tokens[self.cache.new_sequence()] = []

    @precondition(lambda self: 0 < len(self.tokens) < 5)
    @rule(data=st.data())
    def fork(self, data):
        sequence_id = self.some(data)
        try:
            fork_id = self.cache.fork(sequence_id)
        except CacheFullError:  # half-sealed pages of a failed step are copied
            return
        self.tokens[fork_id] = list(self.tokens[sequence_id])

    @precondition(lambda self: len(self.tokens) < 5)
    @rule(num_tokens=st.integers(0, 600))
    def share(self, num_tokens):
        sequence_id, num_matched = self.cache.share_prefix(TEXT[:num_tokens])
        assert num_matched % PAGE_SIZE == 0
        assert num_matched < max(1, num_tokens)
        self.tokens[sequence_id] = TEXT[:num_matched]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def publish(self, data):
        sequence_id = self.some(data)
        self.cache.publish_prefix(sequence_id, self.tokens[sequence_id])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.one_of(st.integers(1, 70), st.integers(100, 400)))
    def grow(self, data, count):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, max_size=3, unique=True))
        chunks = [self.next_tokens(sequence_id, count + index, data) for index, sequence_id in enumerate(ids)]
        try:
            append(self.cache, ids, chunks)
        except CacheFullError:
            return  # the invariants see that nothing has changed
        for sequence_id, chunk in zip(ids, chunks, strict=True):
            self.tokens[sequence_id] += chunk

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(1, 300), num_layers=st.integers(0, 1))
    def fail_in_a_later_layer(self, data, count, num_layers):
        sequence_id = self.some(data)
        try:
            append(self.cache, [sequence_id], [self.next_tokens(sequence_id, count, data)], range(num_layers))
        except CacheFullError:
            return
        self.cache.check_integrity()
        self.cache.truncate(sequence_id, len(self.tokens[sequence_id]))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        sequence_id = self.some(data)
        length = len(self.tokens[sequence_id])
        num_tokens = data.draw(st.integers(0, length))
        if data.draw(st.booleans()):
            num_tokens -= num_tokens % PAGE_SIZE
        try:
            self.cache.truncate(sequence_id, num_tokens)
        except ConfigError:
            assert num_tokens % PAGE_SIZE
            return
        self.tokens[sequence_id] = self.tokens[sequence_id][:num_tokens]
        self.sealed = {page: content for page, content in self.sealed.items() if page[0] != sequence_id}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        sequence_id = self.some(data)
        self.cache.free(sequence_id)
        del self.tokens[sequence_id]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def spill(self, data):
        sequence_id = self.some(data)
        handle = self.cache.spill(sequence_id, self.tier)
        self.spilled[handle] = self.tokens.pop(sequence_id)

    @precondition(lambda self: self.spilled and len(self.tokens) < 5)
    @rule(data=st.data())
    def restore(self, data):
        handle = data.draw(st.sampled_from(sorted(self.spilled)))
        try:
            sequence_id = self.cache.restore(handle, self.tier)
        except CacheFullError:
            return
        self.tokens[sequence_id] = list(self.spilled[handle])

    @invariant()
    def every_page_has_its_owners(self):
        self.cache.check_integrity()
        assert sorted(self.cache.sequence_ids) == sorted(self.tokens)

    @invariant()
    def every_sequence_holds_its_tokens(self):
        for sequence_id, token_ids in self.tokens.items():
            assert self.cache.length(sequence_id) == len(token_ids)
            for layer_index in range(self.cache.config.num_layers):
                key, value = stored(self.cache, sequence_id, layer_index)
                expected = keys_of(token_ids, layer_index).float()
                assert torch.equal(key, expected)
                assert torch.equal(value, -expected.flip(-1))

    @invariant()
    def sealed_pages_stay_where_they_are(self):
        for sequence_id in self.tokens:
            table = self.cache._tables[sequence_id]
            for page_index in range(table.num_sink_pages, table.settled_end):
                page_id = int(table.packed_ids[page_index])
                assert self.sealed.setdefault((sequence_id, page_index), page_id) == page_id

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for sequence_id in list(self.tokens):
            self.cache.free(sequence_id)
        self.cache._index.clear()
        self.cache.check_integrity()
        assert self.cache._exact.num_free_pages == self.cache._exact.num_pages
        assert self.cache._packed.num_free_pages == self.cache._packed.num_pages


TestLifeCycle = LifeCycle.TestCase
TestLifeCycle.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestLongLifeCycle(LifeCycle.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("chunk_len", [1, 37, 64, 200])
def test_quantized_pages_do_not_change_after_any_append(chunk_len):
    cache = without_attention(make_cache(make_config(8, 4), 600))
    sequence_id = cache.new_sequence()
    pages = {}
    for start in range(0, 600, chunk_len):
        append(cache, [sequence_id], [TEXT[start : min(600, start + chunk_len)]])
        table = cache._tables[sequence_id]
        for layer_index in range(2):
            for page_index in range(1, table.settled_end):
                content = packed_layer(cache, sequence_id, layer_index, page_index)
                before = pages.setdefault((layer_index, page_index), content.clone())
                assert torch.equal(content, before)
    assert len(pages) == 2 * ((600 - 128) // 64 - 1)


@pytest.mark.parametrize("num_window", [0, 1, 64, 100, 128])
@pytest.mark.parametrize("num_before", [0, 1, 64, 200, 255, 257])
def test_a_long_chunk_needs_no_more_exact_pages_than_a_sequence(num_window, num_before):
    tokens = [position % 29 for position in range(800)]
    cache = without_attention(make_cache(make_config(num_window_tokens=num_window), len(tokens)))
    sequence_id = cache.new_sequence()
    if num_before:
        append(cache, [sequence_id], [tokens[:num_before]])
    append(cache, [sequence_id], [tokens[num_before:]])
    cache.check_integrity()
    key, _ = stored(cache, sequence_id, 1)
    assert torch.equal(key, keys_of(tokens, 1).float())
