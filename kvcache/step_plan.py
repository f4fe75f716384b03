"""What pages a step needs, decided before anything changes.

In: page tables and the numbers of new tokens. Out: for each sequence where the exact page of every new page comes from
and how many packed pages it takes. Planning reads, :meth:`SequencePlan.apply` writes.

A step that brings a sequence from n to m tokens needs exact pages for its new tail alone:

    page      sealed before | old tail, full | partly full | new, sealed at once | new tail |
    exact id                 own              own           one for all           own, or one of a page that this
                                                                                  step seals: each layer has sealed
                                                                                  that page before it writes this one

The page that is partly full at n keeps its exact page until the step's last layer has passed: if a layer fails, the
sequence goes on from n. That page is copied first if somebody else owns it too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.page import PAGE_SIZE
from kvcache.page_table import NO_PAGE, PageTable, num_pages_of
from kvcache.pool import PagePool


@dataclass(frozen=True)
class SequencePlan:
    """What one sequence needs for a step.

    Attributes:
        table: its pages.
        new_length: tokens after the step.
        sealed_end: first page behind the sinks that will not be sealed.
        is_copying: the partly full page has other owners and must be copied.
        reused_ids: exact pages of this sequence that its new pages may take over.
        num_exact: exact pages to allocate, the copy included.
        num_packed: packed pages to allocate.
    """

    table: PageTable
    new_length: int
    sealed_end: int
    is_copying: bool
    reused_ids: tuple[int, ...]
    num_exact: int
    num_packed: int

    def apply(self, exact: PagePool, exact_ids: Sequence[int], packed_ids: Sequence[int]) -> None:
        """Enter the pages into the table.

        Args:
            exact: the pool, for the copy and the owners.
            exact_ids: ``num_exact`` pages with one owner each.
            packed_ids: ``num_packed`` pages with one owner each.
        """
        table, fresh_ids = self.table, list(exact_ids)
        new = range(num_pages_of(table.length), num_pages_of(self.new_length))
        table.reserve(max(new.stop, self.sealed_end))
        if self.is_copying:
            self._copy_partial_page(exact, fresh_ids.pop())
        spare_ids = [*self.reused_ids, *fresh_ids]
        for page in range(new.start, min(new.stop, table.num_sink_pages)):
            table.exact_ids[page] = spare_ids.pop()
        first_behind_sinks, first_in_tail = max(new.start, table.num_sink_pages), max(new.start, self.sealed_end)
        if first_behind_sinks < min(first_in_tail, new.stop):  # filled and sealed one after the other
            table.exact_ids[first_behind_sinks : min(first_in_tail, new.stop)] = spare_ids[-1]
        for page in range(first_in_tail, new.stop):
            table.exact_ids[page] = spare_ids.pop()
        exact.retain(table.exact_ids[new.start : new.stop].tolist())
        exact.release(fresh_ids)  # the entries own them now
        first_packed = max(table.sealed_ends)
        table.packed_ids[first_packed : first_packed + self.num_packed] = packed_ids
        table.planned_length, table.planned_sealed_end = self.new_length, self.sealed_end

    def _copy_partial_page(self, exact: PagePool, copy_id: int) -> None:
        page = self.table.length // PAGE_SIZE
        page_id = int(self.table.exact_ids[page])
        exact.memory[copy_id] = exact.memory[page_id]
        exact.release([page_id])
        self.table.exact_ids[page] = copy_id


def plan_step(tables: Sequence[PageTable], num_new_tokens: Sequence[int], exact: PagePool) -> list[SequencePlan]:
    """Plan a step of several sequences; nothing is changed.

    Args:
        tables: different sequences, each between two steps.
        num_new_tokens: for each sequence, at least 1.
        exact: the pool of exact pages, for its owners.
    """
    given_up: Counter[int] = Counter()
    return [_plan(table, count, exact, given_up) for table, count in zip(tables, num_new_tokens, strict=True)]


def _plan(table: PageTable, num_new_tokens: int, exact: PagePool, given_up: Counter[int]) -> SequencePlan:
    length, new_length = table.length, table.length + num_new_tokens
    first_packed = max(table.sealed_ends)
    sealed_end = max(first_packed, table.sealed_end_at(new_length))
    is_copying = False
    if length % PAGE_SIZE:
        page_id = int(table.exact_ids[length // PAGE_SIZE])
        is_copying = exact.num_owners(page_id) - given_up[page_id] > 1
        given_up[page_id] += is_copying
    full_and_sealed = table.exact_ids[table.settled_end : min(sealed_end, length // PAGE_SIZE)]
    reused_ids = tuple(
        page_id for page_id in full_and_sealed.tolist() if page_id != NO_PAGE and exact.num_owners(page_id) == 1
    )
    new = range(num_pages_of(length), num_pages_of(new_length))
    num_sinks = max(0, min(new.stop, table.num_sink_pages) - new.start)
    num_in_tail = max(0, new.stop - max(new.start, sealed_end))
    num_sealed_at_once = len(new) - num_sinks - num_in_tail
    num_spare = max(num_in_tail, min(1, num_sealed_at_once))  # the first page of the tail takes over the passing one
    return SequencePlan(
        table=table,
        new_length=new_length,
        sealed_end=sealed_end,
        is_copying=is_copying,
        reused_ids=reused_ids,
        num_exact=is_copying + num_sinks + max(0, num_spare - len(reused_ids)),
        num_packed=sealed_end - first_packed,
    )
