"""A fixed number of equal pages of bytes, allocated when the pool is made.

A page is *free*, *allocated* (somebody will fill it) or *sealed* (filled, and from then on read only, until freed).
The pool knows nothing of what the bytes mean.
"""

import torch
from torch import Tensor

from moe_bitnet.errors import CacheFullError, ConfigError


class PagePool:
    """Hands out pages of one uint8 tensor and takes them back.

    Args:
        page_bytes: size of a page.
        budget_bytes: bytes that the pool may take; it takes as many whole pages as fit, at once.
    """

    def __init__(self, page_bytes: int, budget_bytes: int) -> None:
        self.num_pages = budget_bytes // page_bytes
        # Written with zeros, so that the operating system commits the memory now and not page fault by page fault.
        try:
            self._memory = torch.empty(self.num_pages, page_bytes, dtype=torch.uint8).zero_()
        except RuntimeError as error:  # what torch raises when memory is refused
            raise ConfigError(
                f"the cache's {self.num_pages * page_bytes} bytes cannot be allocated. Give a smaller budget."
            ) from error
        self._free_ids = list(reversed(range(self.num_pages)))
        self._unsealed_ids: set[int] = set()
        self._sealed_ids: set[int] = set()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory that the pool holds, used or not."""
        return self._memory.nbytes

    @property
    def num_free_pages(self) -> int:
        """Pages that ``allocate`` can still hand out."""
        return len(self._free_ids)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages out of the pool, all or none.

        Args:
            num_pages: how many.

        Returns:
            Their ids. Their content is undefined until ``seal``.

        Raises:
            CacheFullError: fewer pages are free; the pool is unchanged.
        """
        if num_pages > self.num_free_pages:
            raise CacheFullError(
                f"PagePool: asked for {num_pages} pages, {self.num_free_pages} of {self.num_pages} are free. Nothing "
                f"was changed. Free a sequence, give a larger byte budget, or store fewer bits per element."
            )
        page_ids = [self._free_ids.pop() for _ in range(num_pages)]
        self._unsealed_ids.update(page_ids)
        return page_ids

    def seal(self, page_id: int, content: Tensor) -> None:
        """Fill an allocated page, once.

        Args:
            page_id: from ``allocate``, not sealed yet.
            content: ``[page_bytes]`` uint8.
        """
        assert page_id in self._unsealed_ids, f"page {page_id} is free or already sealed"
        self._memory[page_id] = content
        self._unsealed_ids.remove(page_id)
        self._sealed_ids.add(page_id)

    def read(self, page_ids: list[int]) -> Tensor:
        """Copy sealed pages.

        Args:
            page_ids: sealed pages in the wanted order.

        Returns:
            ``[len(page_ids), page_bytes]`` uint8.
        """
        assert self._sealed_ids.issuperset(page_ids), "a page that was never sealed has no content"
        return self._memory[torch.tensor(page_ids, dtype=torch.int64)]

    def free(self, page_ids: list[int]) -> None:
        """Give pages back, sealed or not.

        Args:
            page_ids: allocated pages, each once.
        """
        for page_id in page_ids:
            assert page_id in self._unsealed_ids or page_id in self._sealed_ids, f"page {page_id} is already free"
            self._unsealed_ids.discard(page_id)
            self._sealed_ids.discard(page_id)
            self._free_ids.append(page_id)

    def check_integrity(self) -> None:
        """Assert that every page is in exactly one of the states free, allocated and sealed."""
        ids = [*self._free_ids, *self._unsealed_ids, *self._sealed_ids]
        assert sorted(ids) == list(range(self.num_pages)), "a page is lost or in two states at once"
