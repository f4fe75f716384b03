"""Who owns which pages: sequences start, share, shrink, leave and come back, inside one byte budget.

Memory is two pools. Exact pages (float16) are as many as a number of sequences needs at most; packed pages take all the
rest of the budget. A page is owned by every sequence whose table names it and by the prefix index; it is free when
nobody owns it. What the pages contain is written by ``cache.py``.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch

from kvcache.config import KVCacheConfig
from kvcache.frame import LayerFrame
from kvcache.memory import exact_bytes, num_packed_pages
from kvcache.page import PAGE_SIZE
from kvcache.page_table import NO_PAGE, PageTable
from kvcache.pool import PagePool
from kvcache.prefix import PrefixIndex, SharedPage, page_keys
from kvcache.spill import PageTier, SpilledSequence, check_rows, read_rows, write_rows
from kvcache.step_plan import plan_step
from moe_bitnet.errors import ConfigError


class PageStore:
    """The pages of several sequences, in at most ``budget_bytes`` bytes that are allocated at once.

    Args:
        config: sizes and formats.
        budget_bytes: upper limit of ``allocated_bytes``.
        frames: the maps of every layer, on ``device``.
        is_calibrated: whether they came from calibration, which decides the format of packed keys.
        num_sequences: sequences that are sure of their exact pages.
        device: where the pages are.

    Raises:
        ConfigError: the budget is smaller than the exact pages.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        budget_bytes: int,
        frames: Sequence[LayerFrame],
        is_calibrated: bool,
        num_sequences: int,
        device: torch.device,
    ) -> None:
        num_pages = num_packed_pages(config, budget_bytes, num_sequences)
        if num_pages < 0:
            raise ConfigError(
                f"KV cache: budget_bytes is {budget_bytes}, but the float16 pages of {num_sequences} sequences "
                f"need {exact_bytes(config, num_sequences)}. Give at least that, or lower num_sequences, "
                f"num_sink_tokens or num_window_tokens."
            )
        self.config = config
        self.budget_bytes = budget_bytes
        self._format = config.page_format(is_calibrated)
        self._frames = frames
        self._exact = PagePool(
            "exact", config.exact_page_bytes, num_sequences * config.exact_pages_per_sequence, device
        )
        self._packed = PagePool("packed", config.page_bytes, num_pages, device)
        self._index = PrefixIndex(self._exact, self._packed)
        self._tables: dict[int, PageTable] = {}
        self._next_id = 0
        self._format_id: bytes | None = None

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage that the cache holds, used or not, from its making on; at most the budget."""
        return self._exact.allocated_bytes + self._packed.allocated_bytes

    @property
    def num_free_pages(self) -> int:
        """Packed pages that sequences can still take: free ones, and those that only the prefix index holds."""
        return self._packed.num_free_pages + self._index.num_evictable(is_packed=True)

    @property
    def sequence_ids(self) -> list[int]:
        """Sequences that live."""
        return list(self._tables)

    def length(self, sequence_id: int) -> int:
        """Return the tokens of a sequence that every layer holds."""
        return self._table(sequence_id).length

    def new_sequence(self) -> int:
        """Start an empty sequence and return its id; it takes pages as it grows."""
        return self._add(self._new_table())

    def fork(self, sequence_id: int) -> int:
        """Start a sequence with the same tokens and return its id; pages are shared until one of both writes them.

        Raises:
            ConfigError: the sequence is in the middle of a step.
        """
        table = self._resting_table(sequence_id).copy()
        # left by a step that failed: pages that some layers have sealed and others have not
        half_sealed = slice(table.settled_end, max(table.sealed_ends))
        _, copy_ids = self._take_pages(0, half_sealed.stop - half_sealed.start)
        for copy_id, page_id in zip(copy_ids, table.packed_ids[half_sealed].tolist(), strict=True):
            self._packed.memory[copy_id] = self._packed.memory[page_id]
        table.packed_ids[half_sealed] = NO_PAGE
        self._exact.retain(table.owned_exact_ids())
        self._packed.retain(table.owned_packed_ids())
        table.packed_ids[half_sealed] = copy_ids
        return self._add(table)

    def free(self, sequence_id: int) -> None:
        """End a sequence; pages that nobody else owns are free."""
        table = self._table(sequence_id)
        self._exact.release(table.owned_exact_ids())
        self._packed.release(table.owned_packed_ids())
        del self._tables[sequence_id]
        self._forget_step()

    def truncate(self, sequence_id: int, num_tokens: int) -> None:
        """Forget the tokens of a sequence behind the first ``num_tokens``, and a step that was not finished.

        Raises:
            ConfigError: the sequence is shorter, or a packed page would be cut in two (a page is never quantized
                twice); nothing is changed.
        """
        table = self._table(sequence_id)
        if not 0 <= num_tokens <= table.length:
            raise ConfigError(f"truncate: num_tokens is {num_tokens}; sequence {sequence_id} has 0 to {table.length}.")
        if num_tokens < table.length and not table.can_be_cut_to(num_tokens):
            first_exact = min(PAGE_SIZE * max(table.sealed_ends), table.length)
            raise ConfigError(
                f"truncate: num_tokens is {num_tokens}, inside a packed page. Give a multiple of {PAGE_SIZE}, a number "
                f"up to {PAGE_SIZE * table.num_sink_pages}, or one from {first_exact} to {table.length}."
            )
        self._cut(table, num_tokens)

    def share_prefix(self, token_ids: Sequence[int], salt: bytes = b"") -> tuple[int, int]:
        """Start a sequence with the pages of the longest published beginning of ``token_ids``.

        At least one token is left to compute, whose logits the caller needs.

        Args:
            token_ids: the whole prompt.
            salt: only beginnings that were published with the same salt are found.

        Returns:
            The id of the sequence, and the tokens it holds already, a multiple of 64.
        """
        keys = page_keys(token_ids, self.format_id, salt)
        pages = self._index.match(keys[: max(0, len(token_ids) - 1) // PAGE_SIZE])
        table = self._new_table()
        table.reserve(len(pages))
        for page_index, page in enumerate(pages):
            (table.packed_ids if page.is_packed else table.exact_ids)[page_index] = page.page_id
        table.length = table.planned_length = PAGE_SIZE * len(pages)
        table.settled_end = table.planned_sealed_end = max(table.num_sink_pages, len(pages))
        table.sealed_ends = [table.settled_end] * self.config.num_layers
        self._exact.retain(table.owned_exact_ids())
        self._packed.retain(table.owned_packed_ids())
        return self._add(table), table.length

    def publish_prefix(self, sequence_id: int, token_ids: Sequence[int], salt: bytes = b"") -> None:
        """Let later sequences share the full sinks and the packed pages of a sequence, also after it is freed.

        Args:
            sequence_id: whose pages.
            token_ids: its tokens from the first on; tokens that it does not hold yet are left out.
            salt: see ``share_prefix``.

        Raises:
            ConfigError: the sequence is in the middle of a step.
            DataError: the tokens are no integers.
        """
        table = self._resting_table(sequence_id)
        keys = page_keys(token_ids[: table.length], self.format_id, salt)[: table.settled_end]
        pages = [self._shared_page(table, page_index) for page_index in range(len(keys))]
        self._index.publish(keys, pages)

    def spill(self, sequence_id: int, tier: PageTier) -> Any:
        """Copy a sequence to a tier and free it here; pages that others share stay for them.

        Returns:
            The tier's handle, for ``restore``.

        Raises:
            ConfigError: the sequence is in the middle of a step.
        """
        table = self._resting_table(sequence_id)
        metadata = SpilledSequence.of(table, self.format_id.hex()).metadata()
        handle = tier.write(read_rows(table, self._packed, self._exact), metadata)
        self.free(sequence_id)
        return handle

    def restore(self, handle: Any, tier: PageTier) -> int:
        """Bring a spilled sequence back, bit for bit, and return its new id.

        Raises:
            CacheFullError: it does not fit; nothing is changed and the handle stays valid.
            DataError: the tier gave something else, or the cache has another format.
        """
        rows, metadata = tier.read(handle)
        spilled = SpilledSequence.from_metadata(metadata, self.format_id.hex())
        check_rows(rows, spilled, self._packed, self._exact)
        exact_ids, packed_ids = self._take_pages(len(spilled.exact_pages), len(spilled.packed_pages))
        write_rows(rows, packed_ids, exact_ids, self._packed, self._exact)
        table = self._new_table()
        spilled.enter(table, packed_ids, exact_ids)
        for page_id in table.packed_ids[table.num_sink_pages : table.settled_end].tolist():
            self._packed.seal(page_id)
        return self._add(table)

    @property
    def format_id(self) -> bytes:
        """What pages must have in common to be exchanged: the format and the frames, hashed."""
        if self._format_id is None:
            digest = blake2b(repr((self._format, self.config.num_sink_tokens)).encode(), digest_size=16)
            for frame in self._frames:
                for plane in (frame.key, frame.value):
                    digest.update(plane.mean.cpu().numpy().tobytes())
                    digest.update(plane.encode_matrix.cpu().numpy().tobytes())
                    digest.update(plane.decode_matrix.cpu().numpy().tobytes())
            self._format_id = digest.digest()
        return self._format_id

    def check_integrity(self) -> None:
        """Assert that every page has the owners it is said to have, and that every layer finds its tokens."""
        exact_ids, packed_ids = self._index.owned_ids(is_packed=False), self._index.owned_ids(is_packed=True)
        for table in self._tables.values():
            table.check_integrity()
            exact_ids += table.owned_exact_ids()
            packed_ids += table.owned_packed_ids()
            for page_index, page_id in enumerate(table.packed_ids.tolist()):
                is_complete = table.num_sink_pages <= page_index < table.settled_end
                assert page_id < 0 or self._packed.is_sealed(page_id) == is_complete, "a packed page is half filled"
        self._exact.check_integrity(exact_ids)
        self._packed.check_integrity(packed_ids)

    def _reserve(self, tables: Sequence[PageTable], counts: Sequence[int]) -> None:
        """Reserve the pages of a step for every sequence that is not in one."""
        new = []
        for table, count in zip(tables, counts, strict=True):
            if table.planned_length != table.length + count:
                if table.planned_length > table.length:  # planned otherwise, but no layer has begun
                    self._cut(table, table.length)
                new.append((table, count))
        if not new:
            return
        plans = plan_step([table for table, _ in new], [count for _, count in new], self._exact)
        exact_ids, packed_ids = self._take_pages(
            sum(plan.num_exact for plan in plans), sum(plan.num_packed for plan in plans)
        )
        for plan in plans:
            plan.apply(self._exact, _take(exact_ids, plan.num_exact), _take(packed_ids, plan.num_packed))

    def _new_table(self) -> PageTable:
        num_sink_pages = self.config.num_sink_tokens // PAGE_SIZE
        return PageTable(self.config.num_layers, num_sink_pages, self.config.num_window_tokens)

    def _add(self, table: PageTable) -> int:
        self._next_id += 1
        self._tables[self._next_id] = table
        return self._next_id

    def _table(self, sequence_id: int) -> PageTable:
        table = self._tables.get(sequence_id)
        if table is None:
            raise ConfigError(f"KV cache: there is no sequence {sequence_id}; there are {list(self._tables)}.")
        return table

    def _resting_table(self, sequence_id: int) -> PageTable:
        table = self._table(sequence_id)
        if table.is_between_layers:
            raise ConfigError(
                f"KV cache: sequence {sequence_id} is in the middle of a step. Extend its other layers, or "
                f"truncate it to {table.length} tokens."
            )
        if table.planned_length > table.length:  # no layer has begun
            self._cut(table, table.length)
        return table

    def _cut(self, table: PageTable, num_tokens: int) -> None:
        exact_ids, packed_ids = table.cut(num_tokens)
        self._exact.release(exact_ids)
        self._packed.release(packed_ids)
        self._settle(table)
        self._forget_step()

    def _settle(self, table: PageTable) -> None:
        exact_ids, packed_ids = table.settle()
        self._exact.release(exact_ids)
        for page_id in packed_ids:
            self._packed.seal(page_id)

    def _take_pages(self, num_exact: int, num_packed: int) -> tuple[list[int], list[int]]:
        """Allocate pages of both kinds or none; pages that only the index owns make room."""
        for pool, is_packed, count in ((self._exact, False, num_exact), (self._packed, True, num_packed)):
            if count > pool.num_free_pages:
                pool.require(count, self._index.num_evictable(is_packed))
        self._index.evict(False, num_exact - self._exact.num_free_pages)
        self._index.evict(True, num_packed - self._packed.num_free_pages)
        return self._exact.allocate(num_exact), self._packed.allocate(num_packed)

    def _shared_page(self, table: PageTable, page_index: int) -> SharedPage:
        is_packed = page_index >= table.num_sink_pages
        return SharedPage(int((table.packed_ids if is_packed else table.exact_ids)[page_index]), is_packed)

    def _forget_step(self) -> None:
        """Called when the pages of a planned step may have changed."""


def _take(ids: list[int], count: int) -> list[int]:
    """Remove the last ``count`` ids of a list and return them."""
    taken = ids[len(ids) - count :]
    del ids[len(ids) - count :]
    return taken
