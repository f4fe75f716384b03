import pytest

from kvcache.pool import PagePool
from kvcache.prefix import PrefixIndex, SharedPage, page_keys
from moe_bitnet.errors import DataError

TEXT = [position % 61 for position in range(400)]


@pytest.fixture
def pools():
    return PagePool("exact", 64, 4), PagePool("packed", 64, 8)


@pytest.fixture
def index(pools):
    return PrefixIndex(*pools)


def publish(index, pools, token_ids, num_sinks=1):
    """Publish pages as a sequence of these tokens would, then free the sequence; returns its keys and pages."""
    keys = page_keys(token_ids, b"format")
    pages = [SharedPage(pools[page >= num_sinks].allocate(1)[0], page >= num_sinks) for page in range(len(keys))]
    index.publish(keys, pages)
    for page in pages:
        pools[page.is_packed].release([page.page_id])
    return keys, pages


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 0), (63, 0), (64, 1), (127, 1), (128, 2), (400, 6)])
def test_full_pages_have_keys(num_tokens, num_keys):
    assert len(page_keys(TEXT[:num_tokens], b"format")) == num_keys


def test_equal_keys_mean_equal_beginnings():
    keys = page_keys(TEXT, b"format")
    assert len(set(keys)) == 6
    assert page_keys(tuple(TEXT[:200]), b"format") == keys[:3]
    for position in (0, 63, 64, 130):
        changed = list(TEXT)
        changed[position] += 1
        others = page_keys(changed, b"format")
        first = position // 64
        assert others[:first] == keys[:first]
        assert not set(others[first:]) & set(keys)


def test_formats_and_salts_do_not_share():
    variants = [page_keys(TEXT, *names) for names in ((b"a",), (b"b",), (b"a", b"b"), (b"ab",), (b"", b"ab"))]
    assert len({key for keys in variants for key in keys}) == 5 * 6


@pytest.mark.parametrize("token_ids", [["a"] * 64, [2**64] * 64, [None] * 64])
def test_tokens_that_are_no_integers_are_refused(token_ids):
    with pytest.raises(DataError, match="token ids"):
        page_keys(token_ids, b"format")


def test_the_longest_known_beginning_is_found(index, pools):
    keys, pages = publish(index, pools, TEXT[:320])
    assert index.match(keys) == pages
    assert index.match(page_keys(TEXT, b"format")) == pages
    assert index.match(page_keys([*TEXT[:130], *TEXT], b"format")) == pages[:2]
    assert index.match(page_keys(TEXT[1:], b"format")) == []
    assert len(index) == 5


def test_a_known_key_keeps_its_page(index, pools):
    keys, pages = publish(index, pools, TEXT[:128])
    publish(index, pools, TEXT[:256])
    assert index.match(keys) == pages
    assert pools[0].num_free_pages == 3
    assert pools[1].num_free_pages == 8 - 3


def test_the_least_recently_used_chain_goes_first_and_from_its_end(index, pools):
    old, _ = publish(index, pools, TEXT[:256])
    new, _ = publish(index, pools, TEXT[7:199])
    index.match(old[:2])  # used again, its first two pages
    assert index.num_evictable(is_packed=True) == 3 + 2
    index.evict(True, 2)
    assert len(index.match(old)) == 2
    index.evict(True, 1)
    assert len(index.match(new)) == 2
    assert len(index.match(old)) == 2
    index.evict(True, 0)
    index.evict(True, -1)
    assert pools[1].num_free_pages == 8 - 2


def test_pages_that_sequences_use_are_not_evicted(index, pools):
    keys, pages = publish(index, pools, TEXT[:256])
    pools[1].retain([pages[3].page_id])
    assert index.num_evictable(is_packed=True) == 2
    index.evict(True, 3)
    assert pools[1].num_owners(pages[3].page_id) == 2
    assert len(index.match(keys)) == 1
    assert index.num_evictable(is_packed=False) == 1


def test_clearing_gives_all_pages_back(index, pools):
    publish(index, pools, TEXT[:256])
    assert len(index.owned_ids(is_packed=True)) == 3
    index.clear()
    assert len(index) == 0
    for pool in pools:
        pool.check_integrity([])
