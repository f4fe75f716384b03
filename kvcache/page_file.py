"""A tier in a file: cold pages leave memory with what belongs to them, and come back bit for bit.

The file is a header and then records; ``page_file_format.py`` draws them. A record is written in this order:

    head, metadata, checksum of each page | pages | wait for the disk | mark | wait for the disk

A record counts once its mark is there. So a process that is killed leaves whole records and at most one without a
mark, which the next writer cuts off. Checksums find any changed bit when a record is read, or, in a head or mark, when
the file is opened. Dropped records keep their space until they are the last ones or ``compact`` is called.

Reading maps one record at a time, so memory holds what was asked for. Should another program cut the file short
during a read, the system ends the process (SIGBUS); the lock keeps users of this class from doing so.
"""

import fcntl
import logging
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcache.locked_file import CHUNK_BYTES, flush_folder, mapped, open_locked, translated_errors, write_all
from kvcache.page_file_format import (
    BLOCK_BYTES,
    CHECKSUM,
    COMMITTED,
    DROPPED,
    FRAME_BYTES,
    HEAD,
    Record,
    decode_metadata,
    encode_header,
    encode_metadata,
    why_refused,
)
from moe_bitnet.errors import DataError, ShapeError

logger = logging.getLogger(__name__)


class PageFile:
    """Keeps pages in a file, for one writer or several readers, one thread each.

    Args:
        path: created if it is missing and the file is opened for writing; only its owner may read it.
        page_bytes: bytes of every page.
        format_id: what the bytes mean, at most 1024 bytes of UTF-8; a file with another one is refused.
        is_read_only: leave the file as it is; several may read at once, while nobody writes.

    Attributes:
        incomplete_bytes: what an interrupted write had left behind the last whole record when the file was opened. A
            reader passes over it, a writer has cut it off.

    Raises:
        ConfigError: page size or format id are impossible.
        DataError: the file is in use, cannot be opened, is of another kind or format, or is damaged.
        CacheFullError: the disk has no room for the header.
    """

    def __init__(self, path: str | os.PathLike[str], page_bytes: int, format_id: str, is_read_only: bool = False):
        self.path = Path(path).resolve()
        self.page_bytes = page_bytes
        self.is_read_only = is_read_only
        self.incomplete_bytes = 0
        self._header = encode_header(page_bytes, format_id)
        self._records: dict[str, Record] = {}
        self._end = BLOCK_BYTES
        self._dropped_bytes = 0
        self._descriptor: int | None = open_locked(self.path, is_read_only)
        try:
            with translated_errors(self.path):
                self._read_header(format_id)
                self._find_records()
                if not is_read_only:
                    self._compact_path.unlink(missing_ok=True)
                    self._cut_tail()
        except BaseException:
            self.close()
            raise

    @property
    def handles(self) -> list[str]:
        """Handles of all records, oldest first."""
        return list(self._records)

    @property
    def used_bytes(self) -> int:
        """Bytes of the file up to the end of its last record, dropped ones included."""
        return self._end

    @property
    def dropped_bytes(self) -> int:
        """Bytes that ``compact`` would free."""
        return self._dropped_bytes

    def write(self, pages: Tensor, metadata: dict[str, Any]) -> str:
        """Append a record, which is on the disk when this returns.

        Args:
            pages: uint8 ``[num_pages, page_bytes]`` on any device.
            metadata: values that JSON gives back as they were: no tuples, and no NaN.
        Returns:
            The handle, valid until the record is dropped, also after the file was closed or compacted.
        Raises:
            ShapeError: the pages have another shape or dtype.
            DataError: the metadata is not JSON, or the disk reports an error.
            CacheFullError: the disk is full. In any case of failure the file is as it was.
        """
        descriptor = self._writable()
        data = _bytes_of(pages, self.page_bytes)
        text = encode_metadata(metadata)
        table = b"".join(CHECKSUM.pack(zlib.crc32(page)) for page in _split(data, self.page_bytes))
        checksums = zlib.crc32(text), zlib.crc32(table)
        record = Record(self._end, self.page_bytes, secrets.token_bytes(8), len(pages), len(text), *checksums)
        with translated_errors(self.path), self._all_or_nothing(descriptor):
            os.ftruncate(descriptor, record.offset)  # what a failed write could not take away
            write_all(descriptor, record.frame(HEAD) + text + table, record.offset)
            write_all(descriptor, data, record.pages_offset)
            os.fsync(descriptor)
            write_all(descriptor, record.frame(COMMITTED), record.mark_offset)
            os.fsync(descriptor)
        self._records[record.handle] = record
        self._end = record.end
        return record.handle

    def read(self, handle: str) -> tuple[Tensor, dict[str, Any]]:
        """Return the pages, uint8 ``[num_pages, page_bytes]`` on the CPU, and the metadata of a record.

        Raises:
            DataError: there is no such record, or it is damaged; the message names the first bad page.
        """
        record = self._record(handle)
        metadata = self.metadata(handle)
        with self._mapped(record.table_offset, record.end) as view:
            table = bytes(view[: record.num_pages * CHECKSUM.size])
            pages = torch.empty(record.num_pages, self.page_bytes, dtype=torch.uint8)
            data = _bytes_of(pages, self.page_bytes)
            data[:] = view[record.pages_offset - record.table_offset :][: len(data)]
        if zlib.crc32(table) != record.table_checksum:
            raise self._damaged(record, "the page checksums do not match their own")
        for index, page in enumerate(_split(data, self.page_bytes)):
            if zlib.crc32(page) != CHECKSUM.unpack_from(table, index * CHECKSUM.size)[0]:
                raise self._damaged(record, f"page {index} does not match its checksum")
        return pages, metadata

    def metadata(self, handle: str) -> dict[str, Any]:
        """Return the metadata of a record without reading its pages.

        Raises:
            DataError: there is no such record, or its metadata is damaged.
        """
        record = self._record(handle)
        with self._mapped(record.metadata_offset, record.table_offset) as view:
            text = bytes(view)
        if zlib.crc32(text) != record.metadata_checksum:
            raise self._damaged(record, "the metadata does not match its checksum")
        metadata = decode_metadata(text)
        if metadata is None:
            raise self._damaged(record, "the metadata is not a JSON object")
        return metadata

    def drop(self, handle: str) -> None:
        """Forget a record. Its space is free at once if no record lies behind it, else after ``compact``.

        Raises:
            DataError: there is no such record, or the disk reports an error.
        """
        descriptor, record = self._writable(), self._record(handle)
        with translated_errors(self.path):
            write_all(descriptor, record.frame(DROPPED), record.mark_offset)
            del self._records[handle]
            self._end = max((kept.end for kept in self._records.values()), default=BLOCK_BYTES)
            self._count_dropped()
            os.ftruncate(descriptor, self._end)
            os.fsync(descriptor)

    def compact(self) -> int:
        """Give the space of dropped records back; handles stay valid.

        The records move to a file beside this one, which takes its place: the disk needs room for both.

        Returns:
            The bytes freed.
        Raises:
            CacheFullError: the disk is full; the file is as it was.
            DataError: the disk reports an error.
        """
        old, freed_bytes = self._writable(), self._dropped_bytes
        if freed_bytes == 0:
            return 0
        with translated_errors(self.path):
            new = os.open(self._compact_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
                records = self._copy_records(old, new)
                os.replace(self._compact_path, self.path)
            except BaseException:
                os.close(new)
                with suppress(OSError):
                    self._compact_path.unlink(missing_ok=True)
                raise
            self._descriptor, self._records = new, records
            self._end -= freed_bytes
            self._dropped_bytes = 0
            os.close(old)
            flush_folder(self.path)
        return freed_bytes

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "PageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _compact_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.compact")

    def _open(self) -> int:
        if self._descriptor is None:
            raise DataError(f"{self.path} is closed. Open it again.")
        return self._descriptor

    def _writable(self) -> int:
        if self.is_read_only:
            raise DataError(f"{self.path} is open for reading only. Open it with is_read_only=False.")
        return self._open()

    def _record(self, handle: str) -> Record:
        if handle not in self._records:
            raise DataError(
                f"{self.path} has no record {handle!r}; it holds {len(self._records)}. Was it dropped, written to "
                f"another file, or interrupted?"
            )
        return self._records[handle]

    def _read_header(self, format_id: str) -> None:
        descriptor = self._open()
        found = os.pread(descriptor, BLOCK_BYTES, 0)
        # The file is new, or its maker was killed before the header was whole
        if len(found) < BLOCK_BYTES and self._header.startswith(found) and not self.is_read_only:
            write_all(descriptor, self._header, 0)
            os.fsync(descriptor)
            flush_folder(self.path)
            return
        reason = why_refused(found, self.page_bytes, format_id)
        if reason:
            raise DataError(f"{self.path} {reason}")

    def _find_records(self) -> None:
        size = os.fstat(self._open()).st_size
        while self._end < size:
            record = self._record_at(self._end, size)
            if record is None:
                self._check_tail(size)
                break
            self._end = record.end
        self._count_dropped()
        self.incomplete_bytes = max(0, size - self._end)

    def _record_at(self, offset: int, size: int) -> Record | None:
        """Take in the record that starts at ``offset``; None if there is none that was finished."""
        record = Record.parse(os.pread(self._open(), FRAME_BYTES, offset), offset, self.page_bytes)
        if record is None or record.end > size:
            return None
        mark = os.pread(self._open(), FRAME_BYTES, record.mark_offset)
        if not any(mark):
            return None
        is_committed = record.is_committed(mark)
        if is_committed is None:
            raise DataError(f"{self.path}: {record} is damaged: its mark is wrong. Restore the file, or delete it.")
        if is_committed:
            self._records[record.handle] = record
        return record

    def _check_tail(self, size: int) -> None:
        """Refuse to take a damaged record for an unfinished one: nothing behind that can have a mark."""
        with self._mapped(self._end, size) as view:
            for place in range(0, len(view), BLOCK_BYTES):
                frame = bytes(view[place + BLOCK_BYTES - FRAME_BYTES : place + BLOCK_BYTES])
                if Record.parse(frame, 0, self.page_bytes, COMMITTED) is not None:
                    raise DataError(
                        f"{self.path}: the record at byte {self._end} is damaged: its head does not match its "
                        f"checksum, or it claims more than the file has. Restore the file, or delete it."
                    )

    def _cut_tail(self) -> None:
        if self.incomplete_bytes:
            logger.warning("%s: %d bytes of an unfinished record are cut off", self.path, self.incomplete_bytes)
            os.ftruncate(self._open(), self._end)
            os.fsync(self._open())

    def _count_dropped(self) -> None:
        kept = sum(record.end - record.offset for record in self._records.values())
        self._dropped_bytes = self._end - BLOCK_BYTES - kept

    def _copy_records(self, old: int, new: int) -> dict[str, Record]:
        """Write header and records to another file; returns where they lie there."""
        write_all(new, self._header, 0)
        records, end = {}, BLOCK_BYTES
        for handle, record in self._records.items():
            moved = replace(record, offset=end)
            for place in range(0, moved.end - end, CHUNK_BYTES):
                num_bytes = min(CHUNK_BYTES, moved.end - end - place)
                chunk = os.pread(old, num_bytes, record.offset + place)
                if len(chunk) < num_bytes:
                    raise self._damaged(record, "the file ends within it")
                write_all(new, chunk, end + place)
            records[handle], end = moved, moved.end
        os.fsync(new)
        return records

    @contextmanager
    def _all_or_nothing(self, descriptor: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(OSError):  # a tail without a mark does no harm
                os.ftruncate(descriptor, self._end)
            raise

    @contextmanager
    def _mapped(self, start: int, end: int) -> Iterator[memoryview]:
        with translated_errors(self.path), mapped(self.path, self._open(), start, end) as view:
            yield view

    def _damaged(self, record: Record, reason: str) -> DataError:
        return DataError(f"{self.path}: {record} is damaged: {reason}. Drop it, or restore the file.")


def _bytes_of(pages: Tensor, page_bytes: int) -> memoryview:
    """Return the bytes of pages, without a copy if they are contiguous and on the CPU."""
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != page_bytes:
        raise ShapeError(
            f"page file: the pages are {pages.dtype} {list(pages.shape)}; pass torch.uint8 [num_pages, {page_bytes}]."
        )
    return pages.cpu().contiguous().view(-1).numpy().data


def _split(data: memoryview, page_bytes: int) -> Iterator[memoryview]:
    return (data[start : start + page_bytes] for start in range(0, len(data), page_bytes))
