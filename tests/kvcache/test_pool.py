import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.pool import PagePool
from moe_bitnet.errors import CacheFullError

PAGE_BYTES = 6


def page_of(byte):
    return torch.full((PAGE_BYTES,), byte, dtype=torch.uint8)


@pytest.mark.parametrize("budget_bytes", [0, 5, 6, 47])
def test_pool_takes_whole_pages_within_its_budget(budget_bytes):
    pool = PagePool(PAGE_BYTES, budget_bytes)
    assert pool.allocated_bytes == budget_bytes // PAGE_BYTES * PAGE_BYTES
    assert pool.num_free_pages == pool.num_pages == budget_bytes // PAGE_BYTES


def test_full_pool_says_asked_free_and_total_and_changes_nothing():
    pool = PagePool(PAGE_BYTES, 7 * PAGE_BYTES)
    pool.allocate(5)
    with pytest.raises(CacheFullError, match="asked for 3 pages, 2 of 7 are free"):
        pool.allocate(3)
    assert pool.num_free_pages == 2
    pool.check_integrity()


def test_page_is_sealed_once():
    pool = PagePool(PAGE_BYTES, PAGE_BYTES)
    (page_id,) = pool.allocate(1)
    pool.seal(page_id, page_of(1))
    with pytest.raises(AssertionError, match="already sealed"):
        pool.seal(page_id, page_of(2))
    assert torch.equal(pool.read([page_id])[0], page_of(1))


def test_page_that_was_never_sealed_cannot_be_read():
    pool = PagePool(PAGE_BYTES, PAGE_BYTES)
    with pytest.raises(AssertionError, match="never sealed"):
        pool.read(pool.allocate(1))


def test_page_is_freed_once():
    pool = PagePool(PAGE_BYTES, PAGE_BYTES)
    page_ids = pool.allocate(1)
    pool.free(page_ids)
    with pytest.raises(AssertionError, match="already free"):
        pool.free(page_ids)


def test_read_keeps_the_order_asked_for():
    pool = PagePool(PAGE_BYTES, 3 * PAGE_BYTES)
    page_ids = pool.allocate(3)
    for byte, page_id in enumerate(page_ids):
        pool.seal(page_id, page_of(byte))
    assert torch.equal(pool.read(page_ids[::-1]), torch.stack([page_of(2), page_of(1), page_of(0)]))


def test_integrity_check_finds_a_lost_page():
    pool = PagePool(PAGE_BYTES, 3 * PAGE_BYTES)
    pool._free_ids.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "seal", "free"]), st.integers(0, 255)), max_size=60))
def test_any_life_keeps_every_page_and_its_content(actions):
    pool = PagePool(PAGE_BYTES, 7 * PAGE_BYTES)
    unsealed, content = [], {}
    for action, number in actions:
        if action == "allocate":
            count = number % 4
            if count > pool.num_free_pages:
                with pytest.raises(CacheFullError):
                    pool.allocate(count)
            else:
                unsealed += pool.allocate(count)
        elif action == "seal" and unsealed:
            page_id = unsealed.pop(number % len(unsealed))
            pool.seal(page_id, page_of(number))
            content[page_id] = page_of(number)
        elif action == "free" and (unsealed or content):
            held = [*unsealed, *content]
            page_id = held[number % len(held)]
            pool.free([page_id])
            unsealed = [other for other in unsealed if other != page_id]
            content.pop(page_id, None)
        pool.check_integrity()
        assert pool.num_free_pages == 7 - len(unsealed) - len(content)
        for page_id, expected in content.items():
            assert torch.equal(pool.read([page_id])[0], expected)
