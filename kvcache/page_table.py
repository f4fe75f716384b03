"""Which pages hold the tokens of one sequence, and how far each layer has come.

Page i holds tokens ``64 i`` to ``64 i + 63`` in all layers. Its entry is an exact id, a packed id, or both: while the
layers of a step seal a page one after the other, those that have sealed it read the packed page, the others the exact
one. With sinks of S pages:

    page     0 .. S - 1 | S .. sealed_ends[layer] - 1 | sealed_ends[layer] ..
             exact      | packed                      | exact

A *step* appends the same tokens to every layer. From its first layer on ``planned_length`` is larger than ``length``,
and the entries hold what the step will need; with its last layer ``length`` catches up.
"""

import numpy as np
import numpy.typing as npt

from kvcache.page import PAGE_SIZE

Ids = npt.NDArray[np.int32]
NO_PAGE = -1


def num_pages_of(num_tokens: int) -> int:
    """Count the pages that tokens lie in, the last of them perhaps not full."""
    return -(-num_tokens // PAGE_SIZE)


def sealed_end(num_tokens: int, num_sink_pages: int, num_window_tokens: int) -> int:
    """Return the page behind the last one that a sequence has sealed: the rule of sinks and window."""
    return max(num_sink_pages, (num_tokens - num_window_tokens) // PAGE_SIZE)


class PageTable:
    """The pages of one sequence.

    Args:
        num_layers: L.
        num_sink_pages: S, first pages that are never sealed.
        num_window_tokens: recent tokens that stay exact.

    Attributes:
        length: tokens that every layer holds.
        planned_length: tokens after the step that is under way; ``length`` between steps.
        planned_sealed_end: first page behind the sinks that this step will not have sealed.
        is_done: for each layer whether it has appended its tokens of the step.
        sealed_ends: for each layer the page behind the last packed one; S if there is none.
        settled_end: pages from S to here are packed in all layers, and their exact pages are given back.
        exact_ids: int32, by page; ``NO_PAGE`` if the page has no exact page. Longer than the sequence.
        packed_ids: int32, likewise.
    """

    def __init__(self, num_layers: int, num_sink_pages: int, num_window_tokens: int) -> None:
        self.num_sink_pages = num_sink_pages
        self.num_window_tokens = num_window_tokens
        self.length = 0
        self.planned_length = 0
        self.planned_sealed_end = num_sink_pages
        self.is_done = [False] * num_layers
        self._num_done = 0
        self.sealed_ends = [num_sink_pages] * num_layers
        self.settled_end = num_sink_pages
        self.exact_ids: Ids = np.full(16, NO_PAGE, np.int32)
        self.packed_ids: Ids = np.full(16, NO_PAGE, np.int32)

    @property
    def is_between_layers(self) -> bool:
        """Whether some layers have appended the tokens of a step and others have not."""
        return self._num_done > 0

    def copy(self) -> "PageTable":
        """Copy the table between two steps; its pages get no owner by that."""
        assert not self.is_between_layers, "a step is under way"
        other = PageTable(len(self.is_done), self.num_sink_pages, self.num_window_tokens)
        other.length = other.planned_length = self.length
        other.settled_end, other.planned_sealed_end = self.settled_end, max(self.sealed_ends)
        other.sealed_ends = list(self.sealed_ends)
        other.exact_ids, other.packed_ids = self.exact_ids.copy(), self.packed_ids.copy()
        return other

    def sealed_end_at(self, num_tokens: int) -> int:
        """Return the page behind the last one that a sequence of ``num_tokens`` tokens has sealed."""
        return sealed_end(num_tokens, self.num_sink_pages, self.num_window_tokens)

    def reserve(self, num_pages: int) -> None:
        """Make room for entries."""
        missing = num_pages - len(self.exact_ids)
        if missing > 0:
            more = np.full(max(missing, len(self.exact_ids)), NO_PAGE, np.int32)
            self.exact_ids = np.concatenate((self.exact_ids, more))
            self.packed_ids = np.concatenate((self.packed_ids, more))

    def owned_exact_ids(self) -> list[int]:
        """Return every exact id in the table, as often as it occurs."""
        return _present(self.exact_ids)

    def owned_packed_ids(self) -> list[int]:
        """Return every packed id in the table."""
        return _present(self.packed_ids)

    def can_be_cut_to(self, num_tokens: int) -> bool:
        """Return whether the first ``num_tokens`` tokens can go on as a sequence: no sealed page is cut in two."""
        is_exact = num_tokens >= PAGE_SIZE * max(self.sealed_ends) or num_tokens <= PAGE_SIZE * self.num_sink_pages
        return is_exact or num_tokens % PAGE_SIZE == 0

    def cut(self, num_tokens: int) -> tuple[list[int], list[int]]:
        """Forget all tokens behind the first ``num_tokens``, and a step that is under way.

        Returns:
            Exact ids and packed ids that the table no longer holds.
        """
        last_sealed = max(self.num_sink_pages, num_tokens // PAGE_SIZE)
        self.sealed_ends = [min(end, last_sealed) for end in self.sealed_ends]
        self.settled_end = min(self.settled_end, *self.sealed_ends)
        self.length = self.planned_length = num_tokens
        self.planned_sealed_end = max(self.sealed_ends)
        self._start_over()
        exact_ids = _take(self.exact_ids[num_pages_of(num_tokens) :])
        return exact_ids, _take(self.packed_ids[max(self.sealed_ends) :])

    def finish_layer(self, layer_index: int) -> bool:
        """Note that a layer has appended its tokens; return whether that was the last one, so that the step is over."""
        self.is_done[layer_index] = True
        self._num_done += 1
        if self._num_done < len(self.is_done):
            return False
        self.length = self.planned_length
        self._start_over()
        return True

    def settle(self) -> tuple[list[int], list[int]]:
        """Let go of the exact pages that every layer has sealed.

        Returns:
            The exact ids, and the packed ids that are complete by now.
        """
        pages = slice(self.settled_end, min(self.sealed_ends))
        self.settled_end = pages.stop
        return _take(self.exact_ids[pages]), _present(self.packed_ids[pages])

    def _start_over(self) -> None:
        self.is_done = [False] * len(self.is_done)
        self._num_done = 0

    def check_integrity(self) -> None:
        """Assert that every layer finds its tokens."""
        assert min(self.sealed_ends) == self.settled_end or self.is_between_layers or self.planned_length > self.length
        for is_done, sealed_end in zip(self.is_done, self.sealed_ends, strict=True):
            num_pages = num_pages_of(self.planned_length if is_done else self.length)
            packed = slice(self.num_sink_pages, min(sealed_end, num_pages))
            assert (self.packed_ids[packed] != NO_PAGE).all(), "a sealed page is missing"
            assert (self.exact_ids[: min(self.num_sink_pages, num_pages)] != NO_PAGE).all(), "a sink is missing"
            assert (self.exact_ids[sealed_end:num_pages] != NO_PAGE).all(), "a recent page is missing"
        assert (self.packed_ids[: self.num_sink_pages] == NO_PAGE).all(), "a sink is packed"
        if self.planned_length == self.length:
            assert (self.exact_ids[num_pages_of(self.length) :] == NO_PAGE).all(), "an exact page holds no token"
            exact_ids = self.owned_exact_ids()
            assert len(set(exact_ids)) == len(exact_ids), "two entries share an exact page"
            assert (self.packed_ids[max(self.sealed_ends) :] == NO_PAGE).all(), "a packed page holds no token"
        packed_ids = self.owned_packed_ids()
        assert len(set(packed_ids)) == len(packed_ids), "two entries share a packed page"


def _present(ids: Ids) -> list[int]:
    present: list[int] = ids[ids != NO_PAGE].tolist()
    return present


def _take(ids: Ids) -> list[int]:
    """Return the ids and erase them."""
    present = _present(ids)
    ids[:] = NO_PAGE
    return present
