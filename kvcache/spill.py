"""Moving a sequence out of the cache's memory and back, bit for bit.

A sequence becomes rows of one page size and a few numbers, which a *tier* keeps:

    rows      packed pages, oldest first | exact pages, oldest first, as one run of bytes, zeros to the end of its row
    metadata  what the numbers below say, all of them integers, lists of integers or text (JSON can hold them)
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcache.page_table import NO_PAGE, PageTable
from kvcache.pool import PagePool
from moe_bitnet.errors import DataError


class PageTier(Protocol):
    """Memory outside the pools: files, or another machine."""

    def write(self, pages: Tensor, metadata: dict[str, Any]) -> Any:
        """Keep uint8 ``[num_pages, page_bytes]`` and its metadata; return a handle for ``read``."""
        ...

    def read(self, handle: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return what was written; the handle stays valid."""
        ...


@dataclass(frozen=True)
class SpilledSequence:
    """What a tier keeps beside the rows.

    Attributes:
        format_id: format and frames of the cache; only one that agrees can restore.
        length: tokens.
        sealed_ends: for each layer the page behind its last packed one.
        packed_pages: which pages of the sequence are packed, in order of the rows.
        exact_pages: which have an exact page.
    """

    format_id: str
    length: int
    sealed_ends: list[int]
    packed_pages: list[int]
    exact_pages: list[int]

    @classmethod
    def of(cls, table: PageTable, format_id: str) -> "SpilledSequence":
        """Describe a sequence between two steps."""
        packed_pages, exact_pages = (
            (ids != NO_PAGE).nonzero()[0].tolist() for ids in (table.packed_ids, table.exact_ids)
        )
        return cls(format_id, table.length, list(table.sealed_ends), packed_pages, exact_pages)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], format_id: str) -> "SpilledSequence":
        """Read the metadata of a tier.

        Raises:
            DataError: a number is missing, or the format is another.
        """
        try:
            spilled = cls(**metadata)
        except TypeError as error:
            raise DataError(f"restore: the metadata is not that of a spilled sequence ({error}).") from error
        if spilled.format_id != format_id:
            raise DataError(
                "restore: the sequence was spilled by a cache of another format or other frames. Restore it into a "
                "cache with the same config and frames."
            )
        return spilled

    def metadata(self) -> dict[str, Any]:
        """Return the numbers for a tier."""
        return asdict(self)

    def enter(self, table: PageTable, packed_ids: list[int], exact_ids: list[int]) -> None:
        """Fill an empty table with this sequence and the pages that hold it now."""
        table.reserve(max([*self.packed_pages, *self.exact_pages, 0]) + 1)
        table.packed_ids[self.packed_pages] = packed_ids
        table.exact_ids[self.exact_pages] = exact_ids
        table.sealed_ends = list(self.sealed_ends)
        table.length = table.planned_length = self.length
        table.planned_sealed_end, table.settled_end = max(self.sealed_ends), min(self.sealed_ends)


def read_rows(table: PageTable, packed: PagePool, exact: PagePool) -> Tensor:
    """Copy the pages of a sequence: uint8 ``[num_rows, page_bytes of packed pages]`` on the CPU."""
    packed_pages = packed.read(table.owned_packed_ids()).cpu()
    exact_bytes = exact.read(table.owned_exact_ids()).cpu().flatten()
    num_exact_rows = _num_rows_of(exact_bytes.numel(), packed)
    rows = torch.zeros(len(packed_pages) + num_exact_rows, packed.page_bytes, dtype=torch.uint8)
    rows[: len(packed_pages)] = packed_pages
    rows[len(packed_pages) :].view(-1)[: exact_bytes.numel()] = exact_bytes
    return rows


def check_rows(rows: Tensor, spilled: SpilledSequence, packed: PagePool, exact: PagePool) -> None:
    """Check that a tier gave the bytes that the metadata speak of.

    Raises:
        DataError: it did not.
    """
    num_exact_rows = _num_rows_of(len(spilled.exact_pages) * exact.page_bytes, packed)
    expected = [len(spilled.packed_pages) + num_exact_rows, packed.page_bytes]
    if list(rows.shape) != expected or rows.dtype != torch.uint8:
        raise DataError(f"restore: the tier gave {rows.dtype} {list(rows.shape)}; the sequence is uint8 {expected}.")


def write_rows(rows: Tensor, packed_ids: list[int], exact_ids: list[int], packed: PagePool, exact: PagePool) -> None:
    """Put rows, as ``read_rows`` gave them, into pages of the pools."""
    device = packed.memory.device
    num_exact_bytes = len(exact_ids) * exact.page_bytes
    exact_pages = rows[len(packed_ids) :].reshape(-1)[:num_exact_bytes].view(len(exact_ids), exact.page_bytes)
    packed.memory[torch.tensor(packed_ids, dtype=torch.int64, device=device)] = rows[: len(packed_ids)].to(device)
    exact.memory[torch.tensor(exact_ids, dtype=torch.int64, device=device)] = exact_pages.to(device)


def _num_rows_of(num_bytes: int, packed: PagePool) -> int:
    return -(-num_bytes // packed.page_bytes)
