"""Pages that sequences with the same beginning share, found by a chained hash of their tokens.

The key of a page depends on its tokens and on all before it, so equal keys mean equal beginnings:

    key of page i = blake2b(key of page i - 1, tokens 64 i .. 64 i + 63),    key of page -1 = blake2b(format, salt)

The index owns the pages it lists, beside the sequences that use them. When a pool runs short, pages that only the index
owns go, those first that were not looked up for longest; of a chain the last page first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from kvcache.page import PAGE_SIZE
from kvcache.pool import PagePool
from moe_bitnet.errors import DataError

KEY_BYTES = 32


@dataclass(frozen=True)
class SharedPage:
    """A page of the index.

    Attributes:
        page_id: in the pool of its kind.
        is_packed: which pool.
    """

    page_id: int
    is_packed: bool


def page_keys(token_ids: Sequence[int], root: bytes, salt: bytes = b"") -> list[bytes]:
    """Return the key of every full page of tokens.

    Args:
        token_ids: of a sequence, from its first token on.
        root: names the format and the frames.
        salt: keeps apart those who must not share, such as tenants.

    Raises:
        DataError: a token id is no 64-bit integer.
    """
    try:
        tokens = np.asarray(token_ids, dtype=np.int64)
    except (OverflowError, TypeError, ValueError) as error:
        raise DataError(f"token_ids cannot be read as 64-bit integers ({error}). Give a list of token ids.") from error
    key = blake2b(len(root).to_bytes(8, "little") + root + salt, digest_size=KEY_BYTES).digest()
    keys = []
    for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE):
        content = tokens[end - PAGE_SIZE : end].astype("<i8").tobytes()
        key = blake2b(key + content, digest_size=KEY_BYTES).digest()
        keys.append(key)
    return keys


class PrefixIndex:
    """Shared pages by key, least recently used first.

    Args:
        exact: pool of the exact pages.
        packed: pool of the packed pages.
    """

    def __init__(self, exact: PagePool, packed: PagePool) -> None:
        self._pools = {False: exact, True: packed}
        self._pages: OrderedDict[bytes, SharedPage] = OrderedDict()

    def __len__(self) -> int:
        """Count the pages listed."""
        return len(self._pages)

    def match(self, keys: Sequence[bytes]) -> list[SharedPage]:
        """Return the pages of the longest known beginning, and note their use; the index stays their only owner."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        self._touch(keys[: len(pages)])
        return pages

    def publish(self, keys: Sequence[bytes], pages: Sequence[SharedPage]) -> None:
        """List pages and own them; a key that is known keeps the page it has."""
        for key, page in zip(keys, pages, strict=True):
            if key not in self._pages:
                self._pools[page.is_packed].retain([page.page_id])
                self._pages[key] = page
        self._touch(keys)

    def num_evictable(self, is_packed: bool) -> int:
        """Count the pages of one kind that only the index owns."""
        return sum(page.is_packed == is_packed and self._is_idle(page) for page in self._pages.values())

    def evict(self, is_packed: bool, num_pages: int) -> None:
        """Give back pages of one kind that only the index owns, least recently used first."""
        if num_pages <= 0:
            return
        idle = [key for key, page in self._pages.items() if page.is_packed == is_packed and self._is_idle(page)]
        for key in idle[:num_pages]:
            page = self._pages.pop(key)
            self._pools[is_packed].release([page.page_id])

    def clear(self) -> None:
        """Forget all pages; those that sequences use stay theirs."""
        for page in self._pages.values():
            self._pools[page.is_packed].release([page.page_id])
        self._pages.clear()

    def owned_ids(self, is_packed: bool) -> list[int]:
        """Return the ids of one kind."""
        return [page.page_id for page in self._pages.values() if page.is_packed == is_packed]

    def _is_idle(self, page: SharedPage) -> bool:
        return self._pools[page.is_packed].num_owners(page.page_id) == 1

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Make keys the most recent ones, the first of the chain last: a page is never evicted before its successor."""
        for key in reversed(keys):
            self._pages.move_to_end(key)
