"""A fixed number of equal pages of bytes, allocated when the pool is made, with a count of owners for each.

A page is *free*, *allocated* (somebody may still write it) or *sealed* (filled, and from then on read only). A page is
free exactly when nobody owns it: ``allocate`` gives it its first owner, ``retain`` adds one, ``release`` takes one
away. The pool knows nothing of what the bytes mean.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_bitnet.errors import CacheFullError, ConfigError

ALIGNMENT = 64


class PagePool:
    """Hands out pages of one uint8 tensor and takes them back.

    Args:
        name: of the pages, for messages.
        page_bytes: size of a page, a multiple of 64.
        num_pages: how many; their memory is taken at once.
        device: where the memory lies.

    Raises:
        ConfigError: the memory is refused.
    """

    def __init__(self, name: str, page_bytes: int, num_pages: int, device: torch.device | str = "cpu") -> None:
        assert page_bytes % ALIGNMENT == 0, f"pages of {page_bytes} bytes do not start on multiples of {ALIGNMENT}"
        self.name = name
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        # Written with zeros, so that the operating system commits the memory now and not page fault by page fault.
        try:
            self.memory: Tensor = torch.empty(num_pages, page_bytes, dtype=torch.uint8, device=device).zero_()
        except RuntimeError as error:  # what torch raises when memory is refused
            raise ConfigError(
                f"the cache's {num_pages * page_bytes} bytes of {name} pages cannot be allocated. Give a smaller "
                f"budget."
            ) from error
        assert self.memory.data_ptr() % ALIGNMENT == 0, "torch aligns its memory to 64 bytes"
        self._free_ids = list(reversed(range(num_pages)))
        self._num_owners = [0] * num_pages
        self._is_sealed = bytearray(num_pages)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory that the pool holds, used or not."""
        return self.num_pages * self.page_bytes

    @property
    def num_free_pages(self) -> int:
        """Pages that ``allocate`` can still hand out."""
        return len(self._free_ids)

    def num_owners(self, page_id: int) -> int:
        """Return how many own a page."""
        return self._num_owners[page_id]

    def is_sealed(self, page_id: int) -> bool:
        """Return whether a page is read only."""
        return bool(self._is_sealed[page_id])

    def require(self, num_pages: int, num_evictable: int = 0) -> None:
        """Check that pages can be had; nothing is changed.

        Args:
            num_pages: how many are wanted.
            num_evictable: pages that are not free, but that the caller could release first.

        Raises:
            CacheFullError: there are fewer.
        """
        num_available = self.num_free_pages + num_evictable
        if num_pages > num_available:
            raise CacheFullError(
                f"KV cache: asked for {num_pages} {self.name} pages, {num_available} of {self.num_pages} are free "
                f"({self.page_bytes} bytes each, {self.allocated_bytes} in all). Nothing was changed. Free or truncate "
                f"a sequence, give a larger byte budget, or store fewer bits per element."
            )

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages out of the pool, all or none, with one owner each.

        Args:
            num_pages: how many.

        Returns:
            Their ids. Their content is undefined.

        Raises:
            CacheFullError: fewer pages are free; the pool is unchanged.
        """
        self.require(num_pages)
        page_ids = [self._free_ids.pop() for _ in range(num_pages)]
        for page_id in page_ids:
            self._num_owners[page_id] = 1
        return page_ids

    def retain(self, page_ids: Iterable[int]) -> None:
        """Add an owner to pages that have one."""
        for page_id in page_ids:
            assert self._num_owners[page_id] > 0, f"{self.name} page {page_id} is free"
            self._num_owners[page_id] += 1

    def release(self, page_ids: Iterable[int]) -> None:
        """Take an owner from pages; those that have none left are free."""
        for page_id in page_ids:
            assert self._num_owners[page_id] > 0, f"{self.name} page {page_id} is already free"
            self._num_owners[page_id] -= 1
            if self._num_owners[page_id] == 0:
                self._is_sealed[page_id] = 0
                self._free_ids.append(page_id)

    def seal(self, page_id: int) -> None:
        """Declare an allocated page filled, once."""
        assert self._num_owners[page_id] > 0, f"{self.name} page {page_id} is free"
        assert not self._is_sealed[page_id], f"{self.name} page {page_id} is already sealed"
        self._is_sealed[page_id] = 1

    def read(self, page_ids: list[int]) -> Tensor:
        """Copy pages: uint8 ``[len(page_ids), page_bytes]``."""
        assert all(self._num_owners[page_id] > 0 for page_id in page_ids), "a free page has no content"
        return self.memory[torch.tensor(page_ids, dtype=torch.int64, device=self.memory.device)]

    def check_integrity(self, owned_ids: Iterable[int]) -> None:
        """Assert that every page has the owners it is said to have, and that the others are free, once each.

        Args:
            owned_ids: every page id that anybody owns, as often as it is owned.
        """
        num_owners = [0] * self.num_pages
        for page_id in owned_ids:
            num_owners[page_id] += 1
        assert num_owners == self._num_owners, f"{self.name} pages: owners and counts differ"
        free_ids = [page_id for page_id, count in enumerate(num_owners) if count == 0]
        assert sorted(self._free_ids) == free_ids, f"a {self.name} page is lost, or free and owned"
        assert not any(self._is_sealed[page_id] for page_id in free_ids), f"a free {self.name} page is sealed"
