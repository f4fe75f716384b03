"""The bytes of a page file (``page_file.py``): its header, and where the parts of a record lie. Nothing is read here.

    file    | header | record | record | ...                            each starts on a multiple of 4096 bytes
    header  | magic, version, length of the format id, page_bytes | format id | zeros | CRC32 of all that |
    record  | head | metadata: JSON | CRC32 of each page: u32 [n] | zeros | pages | zeros | mark |

Numbers are little-endian. Head and mark are the same 64 bytes behind different words: a head says how long everything
is, and a mark at the end says that all of it was written, or that it was dropped.
"""

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from moe_bitnet.errors import ConfigError, DataError

MAGIC = b"KVPAGES\0"
VERSION = 1
BLOCK_BYTES = 4096
MAX_METADATA_BYTES = 64 * 2**20
MAX_FORMAT_ID_BYTES = 1024

_HEADER = struct.Struct("<8sIIQ")  # magic, version, bytes of the format id, page_bytes
CHECKSUM = struct.Struct("<I")
# word, id, pages, bytes of metadata, CRC32 of metadata, CRC32 of the page checksums; CRC32 of these
_FRAME = struct.Struct("<8s8sQQII20x")
FRAME_BYTES = _FRAME.size + CHECKSUM.size
HEAD, COMMITTED, DROPPED = b"KVrecord", b"KVcommit", b"KVdroppd"


@dataclass(frozen=True)
class Record:
    """Where a record lies and what its head says.

    Attributes:
        offset: its first byte in the file.
        page_bytes: bytes of a page, from the header of the file.
        record_id: 8 random bytes, so that an old handle never means a new record.
        num_pages: pages.
        metadata_bytes: length of the JSON text.
        metadata_checksum: CRC32 of that text.
        table_checksum: CRC32 of the page checksums.
    """

    offset: int
    page_bytes: int
    record_id: bytes
    num_pages: int
    metadata_bytes: int
    metadata_checksum: int
    table_checksum: int

    @classmethod
    def parse(cls, frame: bytes, offset: int, page_bytes: int, word: bytes = HEAD) -> "Record | None":
        """Read a head (or mark), or return None if it is none."""
        if len(frame) < FRAME_BYTES or frame[: len(word)] != word:
            return None
        if zlib.crc32(frame[: _FRAME.size]) != CHECKSUM.unpack_from(frame, _FRAME.size)[0]:
            return None
        return cls(offset, page_bytes, *_FRAME.unpack_from(frame)[1:])

    def frame(self, word: bytes) -> bytes:
        """Return the head, or a mark: 64 bytes."""
        fields = (self.num_pages, self.metadata_bytes, self.metadata_checksum, self.table_checksum)
        frame = _FRAME.pack(word, self.record_id, *fields)
        return frame + CHECKSUM.pack(zlib.crc32(frame))

    def is_committed(self, mark: bytes) -> bool | None:
        """Tell what the 64 bytes of a mark say: True, False if the record was dropped, None if they are wrong."""
        committed, dropped = self.frame(COMMITTED), self.frame(DROPPED)
        if mark == committed:
            return True
        # A drop writes over the mark from its first byte on, and may have been interrupted
        return False if any(mark == dropped[:n] + committed[n:] for n in range(1, FRAME_BYTES + 1)) else None

    @property
    def handle(self) -> str:
        """The id as text."""
        return self.record_id.hex()

    @property
    def metadata_offset(self) -> int:
        """First byte of the metadata."""
        return self.offset + FRAME_BYTES

    @property
    def table_offset(self) -> int:
        """First byte of the page checksums, behind the metadata."""
        return self.metadata_offset + self.metadata_bytes

    @property
    def pages_offset(self) -> int:
        """First byte of the pages, on a multiple of 4096."""
        return _next_block(self.table_offset + self.num_pages * CHECKSUM.size)

    @property
    def mark_offset(self) -> int:
        """First byte of the mark: the last 64 bytes of the record, so that no sector splits it."""
        return self.end - FRAME_BYTES

    @property
    def end(self) -> int:
        """The byte behind the record, on a multiple of 4096."""
        return _next_block(self.pages_offset + self.num_pages * self.page_bytes + FRAME_BYTES)

    def __str__(self) -> str:
        return f"record {self.handle} at byte {self.offset}"


def encode_header(page_bytes: int, format_id: str) -> bytes:
    """Return the first block of a file.

    Raises:
        ConfigError: page size or format id are impossible.
    """
    name = format_id.encode()
    if not 0 < page_bytes < 2**48:
        raise ConfigError(f"page file: page_bytes is {page_bytes}; give the positive size of a page.")
    if not 0 < len(name) <= MAX_FORMAT_ID_BYTES:
        raise ConfigError(f"page file: the format id has {len(name)} bytes; give 1 to {MAX_FORMAT_ID_BYTES}.")
    header = _HEADER.pack(MAGIC, VERSION, len(name), page_bytes) + name
    header = header.ljust(BLOCK_BYTES - CHECKSUM.size, b"\0")
    return header + CHECKSUM.pack(zlib.crc32(header))


def why_refused(found: bytes, page_bytes: int, format_id: str) -> str:
    """Compare the first block of a file with what was asked for; returns the reason to refuse it, or nothing."""
    if not found.startswith(MAGIC):
        return f"is not a page file: it starts with {found[: len(MAGIC)]!r} instead of {MAGIC!r}. Give another path."
    if len(found) < BLOCK_BYTES:
        return f"has {len(found)} bytes, fewer than its header of {BLOCK_BYTES}. Delete it."
    _, version, name_bytes, found_page_bytes = _HEADER.unpack_from(found)
    if version != VERSION:
        return f"has version {version} of the format; this program knows {VERSION}. Give another path, or delete it."
    (checksum,) = CHECKSUM.unpack_from(found, BLOCK_BYTES - CHECKSUM.size)
    if zlib.crc32(found[: -CHECKSUM.size]) != checksum or name_bytes > MAX_FORMAT_ID_BYTES:
        return "has a damaged header: it does not match its checksum. Restore it, or delete it."
    name = found[_HEADER.size : _HEADER.size + name_bytes].decode(errors="replace")
    if name != format_id:
        return f"holds pages of format {name!r}, not {format_id!r}. Use the config and frames that wrote it."
    if found_page_bytes != page_bytes:
        return f"holds pages of {found_page_bytes} bytes, not {page_bytes}. Use the config that wrote it."
    return ""


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    """Return metadata as JSON text.

    Raises:
        DataError: it is none, would come back changed, or is longer than 64 MiB.
    """
    try:
        text = json.dumps(metadata, allow_nan=False)
        is_kept = isinstance(metadata, dict) and json.loads(text) == metadata
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"page file: the metadata is not JSON ({error}). Use text, numbers, lists and dicts."
        ) from error
    if not is_kept:
        raise DataError("page file: JSON would change the metadata. Use a dict with text keys, and lists for tuples.")
    if len(text) > MAX_METADATA_BYTES:
        raise DataError(f"page file: the metadata has {len(text)} bytes; at most {MAX_METADATA_BYTES} are taken.")
    return text.encode("ascii")


def decode_metadata(text: bytes) -> dict[str, Any] | None:
    """Read JSON text, or return None if it is no object."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


def _next_block(offset: int) -> int:
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES
