import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.pool import PagePool
from moe_bitnet.errors import CacheFullError, ConfigError


def make_pool(num_pages=4, page_bytes=128):
    return PagePool("packed", page_bytes, num_pages)


@pytest.mark.parametrize("num_pages", [1, 3, 1000])
def test_pages_start_on_multiples_of_64_bytes(num_pages):
    pool = PagePool("packed", 192, num_pages)
    assert pool.memory.shape == (num_pages, 192)
    assert all(row.data_ptr() % 64 == 0 for row in pool.memory)
    assert pool.allocated_bytes == pool.memory.nbytes


def test_a_pool_may_have_no_pages():
    pool = make_pool(0)
    assert pool.allocated_bytes == pool.num_free_pages == 0
    with pytest.raises(CacheFullError):
        pool.allocate(1)
    pool.check_integrity([])


def test_allocating_takes_all_or_nothing_and_says_what_is_there():
    pool = make_pool()
    first = pool.allocate(3)
    assert len(set(first)) == 3
    with pytest.raises(CacheFullError, match=r"asked for 2 packed pages, 1 of 4 are free \(128 bytes each, 512 in all"):
        pool.allocate(2)
    assert pool.num_free_pages == 1
    pool.check_integrity(first)


def test_pages_that_could_be_evicted_count_where_they_are_named():
    pool = make_pool()
    pool.allocate(4)
    pool.require(2, num_evictable=2)
    with pytest.raises(CacheFullError, match="asked for 3 packed pages, 2 of 4"):
        pool.require(3, num_evictable=2)


def test_a_page_is_free_when_its_last_owner_lets_go():
    pool = make_pool()
    (page_id,) = pool.allocate(1)
    pool.retain([page_id])
    assert pool.num_owners(page_id) == 2
    pool.release([page_id])
    assert pool.num_free_pages == 3
    pool.release([page_id])
    assert pool.num_free_pages == 4
    with pytest.raises(AssertionError, match="already free"):
        pool.release([page_id])
    with pytest.raises(AssertionError, match="is free"):
        pool.retain([page_id])


def test_a_page_is_sealed_once_and_until_it_is_free():
    pool = make_pool()
    (page_id,) = pool.allocate(1)
    pool.seal(page_id)
    assert pool.is_sealed(page_id)
    with pytest.raises(AssertionError, match="already sealed"):
        pool.seal(page_id)
    pool.release([page_id])
    assert not pool.is_sealed(page_id)
    with pytest.raises(AssertionError, match="is free"):
        pool.seal(page_id)


def test_reading_copies_pages_in_the_order_asked_for():
    pool = make_pool()
    ids = pool.allocate(2)
    pool.memory[ids[0]], pool.memory[ids[1]] = 1, 2
    pages = pool.read([ids[1], ids[0]])
    assert pages[:, 0].tolist() == [2, 1]
    pages.zero_()
    assert pool.memory[ids[1], 0] == 2
    assert pool.read([]).shape == (0, 128)
    pool.release(ids)
    with pytest.raises(AssertionError):
        pool.read(ids)


def test_memory_that_is_refused_is_an_error_in_the_settings():
    with pytest.raises(ConfigError, match="cannot be allocated"):
        make_pool(2**50)


def test_memory_is_committed_at_once():
    assert torch.equal(make_pool().memory, torch.zeros(4, 128, dtype=torch.uint8))


@pytest.mark.parametrize("owned", [[], [0], [0, 0, 1], [0, 1, 2]])
def test_wrong_owners_are_found(owned):
    pool = make_pool()
    assert sorted(pool.allocate(2)) == [0, 1]
    pool.check_integrity([0, 1])
    with pytest.raises(AssertionError, match="owners and counts differ"):
        pool.check_integrity(owned)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 5)), max_size=40))
def test_counts_follow_the_owners_through_any_calls(calls):
    pool, owned = make_pool(), []
    for verb, number in calls:
        if verb == "allocate":
            try:
                owned += pool.allocate(number)
            except CacheFullError:
                assert number > pool.num_free_pages
        elif owned:
            page_id = owned[number % len(owned)]
            getattr(pool, verb)([page_id])
            owned.append(page_id) if verb == "retain" else owned.remove(page_id)
        pool.check_integrity(owned)
        assert pool.num_free_pages == 4 - len(set(owned))
