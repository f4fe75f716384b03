"""The 32 bytes in front of every frame, and the checks that a received header must pass.

    byte  0      4       5    6      7    8           12     16        20           24         28
          magic  version kind format zero layer_index epoch  num_rows  hidden_size  num_pairs  crc32
          4      u8      u8   u8     u8   u32         u32    u32       u32          u32        u32

Little endian. The CRC-32 covers bytes 0 to 27 and the body. It detects accidents,
not attackers: a link that crosses a trust boundary needs its own authentication.
"""

import struct
from dataclasses import dataclass
from typing import Literal

from cluster.transport.frames import HEADER_BYTES
from cluster.transport.row_format import EXPERT_METADATA_BYTES, RowFormat, row_bytes
from moe_bitnet.errors import ClusterError

FrameKind = Literal["dispatch", "combine"]

_MAGIC = b"MoEf"
_VERSION = 1
_FIELDS = struct.Struct("<4sBBBxIIIII")
_CHECKSUM = struct.Struct("<I")
_KIND_CODES: dict[FrameKind, int] = {"dispatch": 1, "combine": 2}
_FORMAT_CODES: dict[RowFormat, int] = {"int8": 1, "float16": 2, "float32": 3}
_FORMATS = {code: row_format for row_format, code in _FORMAT_CODES.items()}


@dataclass(frozen=True)
class FrameLimits:
    """The largest frame that a receiver takes; checked before anything is allocated.

    Attributes:
        max_frame_bytes: header and body together.
        max_num_rows: rows in a frame.
        max_hidden_size: values in a row.
        max_num_pairs: (row, expert) pairs in a dispatch frame.
    """

    max_frame_bytes: int = 2**30
    max_num_rows: int = 2**20
    max_hidden_size: int = 2**16
    max_num_pairs: int = 2**24


@dataclass(frozen=True)
class FrameHeader:
    """The sizes that lay out a frame's body.

    Attributes:
        kind: ``"dispatch"`` or ``"combine"``.
        row_format: format of the rows.
        layer_index: MoE layer.
        epoch: number of the sender's placement.
        num_rows: rows in the body.
        hidden_size: values in a row.
        num_pairs: (row, expert) pairs of a dispatch frame; 0 in a combine frame.
    """

    kind: FrameKind
    row_format: RowFormat
    layer_index: int
    epoch: int
    num_rows: int
    hidden_size: int
    num_pairs: int

    @property
    def body_bytes(self) -> int:
        """Bytes that follow the header."""
        return self.num_rows * row_bytes(self.hidden_size, self.row_format) + self.num_pairs * EXPERT_METADATA_BYTES


def pack_fields(header: FrameHeader) -> bytes:
    """Return the header without its checksum, 28 bytes."""
    return _FIELDS.pack(
        _MAGIC,
        _VERSION,
        _KIND_CODES[header.kind],
        _FORMAT_CODES[header.row_format],
        header.layer_index,
        header.epoch,
        header.num_rows,
        header.hidden_size,
        header.num_pairs,
    )


def pack_checksum(checksum: int) -> bytes:
    """Return the last four bytes of a header."""
    return _CHECKSUM.pack(checksum)


def unpack_checksum(frame: memoryview) -> int:
    """Return the checksum that a frame of at least :data:`HEADER_BYTES` claims."""
    return int(_CHECKSUM.unpack_from(frame, _FIELDS.size)[0])


def read_header(frame: memoryview, kind: FrameKind, limits: FrameLimits) -> FrameHeader:
    """Read and check the header of a whole received frame; its checksum is checked elsewhere.

    Args:
        frame: header and body, as unsigned bytes.
        kind: what the receiver waits for.
        limits: the largest sizes that the receiver takes.
    Raises:
        ClusterError: the frame is too short or long, of another protocol, version or kind, or claims
            sizes that break a limit or do not match its length.
    """
    _check(len(frame) >= HEADER_BYTES, f"{len(frame)} bytes are shorter than the header of {HEADER_BYTES}")
    _check_limit("frame bytes", len(frame), limits.max_frame_bytes)
    magic, version, kind_code, format_code, layer_index, epoch, num_rows, hidden_size, num_pairs = _FIELDS.unpack_from(
        frame
    )
    _check(magic == _MAGIC, f"magic is {magic!r}, expected {_MAGIC!r}")
    _check(version == _VERSION, f"version is {version}, this program speaks {_VERSION}; run one version on every host")
    _check(kind_code == _KIND_CODES[kind], f"kind code is {kind_code}, expected {_KIND_CODES[kind]} ({kind})")
    row_format = _FORMATS.get(format_code)
    if row_format is None or (kind == "combine" and row_format == "int8"):
        raise _refusal(f"row format code {format_code} is not one of a {kind} frame")
    _check_limit("rows", num_rows, limits.max_num_rows)
    _check(hidden_size >= 1, "hidden size is 0")
    _check_limit("hidden size", hidden_size, limits.max_hidden_size)
    _check_limit("pairs", num_pairs, limits.max_num_pairs if kind == "dispatch" else 0)
    header = FrameHeader(kind, row_format, layer_index, epoch, num_rows, hidden_size, num_pairs)
    claimed = HEADER_BYTES + header.body_bytes
    _check(len(frame) == claimed, f"{len(frame)} bytes arrived, the header announces {claimed}")
    return header


def _check_limit(name: str, value: int, limit: int) -> None:
    _check(value <= limit, f"{name}: {value} given, the limit is {limit}")


def _check(passed: bool, problem: str) -> None:
    if not passed:
        raise _refusal(problem)


def _refusal(problem: str) -> ClusterError:
    return ClusterError(f"frame refused: {problem}. Send the rows again.")
