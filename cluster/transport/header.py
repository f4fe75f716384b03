"""The 32 bytes in front of every frame, and the checks that a received header must pass.

    byte 0      4        5     6       7        8      10      12     16          20        24         28
         magic  version  kind  format  combine  layer  hidden  epoch  request_id  num_rows  num_pairs  crc32
         4      u8       u8    u8      u8       u16    u16     u32    u32         u32       u32        u32

Little endian. ``combine`` says in a dispatch frame what is to come back, and in a refusal why nothing does.
``request_id`` comes back unchanged, so that a late answer is not taken for another. The CRC-32 covers bytes 0 to 27
and the body. It detects accidents, not attackers: links between hosts are authenticated and encrypted (CURVE).
"""

import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cluster.transport.frames import HEADER_BYTES, RefusalReason
from cluster.transport.row_format import (
    EXPERT_ID_BYTES,
    EXPERT_WEIGHT_BYTES,
    ROW_METADATA_BYTES,
    Combine,
    CombineMode,
    RowFormat,
    row_bytes,
    scale_bytes,
)
from moe_bitnet.errors import FrameError

FrameKind = Literal["dispatch", "combine", "refusal", "probe", "bulk"]

MAX_MESSAGE_BYTES = 4096

_MAGIC = b"MoEf"
_VERSION = 2
_FIELDS = struct.Struct("<4sBBBBHHIIII")
_CHECKSUM = struct.Struct("<I")
_KIND_OFFSET, _REQUEST_ID_OFFSET = 5, 16
_KIND_CODES: dict[FrameKind, int] = {"dispatch": 1, "combine": 2, "refusal": 3, "probe": 4, "bulk": 5}
_KINDS = {code: kind for kind, code in _KIND_CODES.items()}
_FORMAT_CODES: dict[RowFormat, int] = {"int8": 1, "float16": 2, "float32": 3, "bfloat16": 4}
_FORMATS = {code: row_format for row_format, code in _FORMAT_CODES.items()}
_MODE_CODES: dict[CombineMode, int] = {"rows": 0x10, "partial_sums": 0x20}  # the low half is the row format
_COMBINES = {
    mode_code | format_code: Combine(mode, row_format)
    for mode, mode_code in _MODE_CODES.items()
    for row_format, format_code in _FORMAT_CODES.items()
}
_COMBINE_CODES = {combine: code for code, combine in _COMBINES.items()}
_REASON_CODES: dict[RefusalReason, int] = {"protocol": 1, "stale plan": 2, "request": 3, "failure": 4, "bulk": 5}
_REASONS = {code: reason for reason, code in _REASON_CODES.items()}


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
    max_hidden_size: int = 2**16 - 1
    max_num_pairs: int = 2**24


class FrameHeader(NamedTuple):
    """The sizes that lay out a frame's body.

    Attributes:
        kind: which message it is.
        row_format: format of the rows; ``"int8"`` where there are none.
        detail: the :class:`Combine` of a dispatch frame, the reason of a refusal, else ``None``.
        layer_index: MoE layer.
        hidden_size: values in a row; 0 where there are no rows.
        epoch: number of the sender's plan; of a bulk frame, its channel.
        request_id: chosen by who asks, repeated by who answers.
        num_rows: rows in the body.
        num_pairs: (row, expert) pairs of a dispatch frame, bytes of a refusal's message or of what a bulk frame
            announces, else 0.
    """

    kind: FrameKind
    row_format: RowFormat
    detail: Combine | RefusalReason | None
    layer_index: int
    hidden_size: int
    epoch: int
    request_id: int
    num_rows: int
    num_pairs: int


class PartBytes(NamedTuple):
    """Bytes of the parts of a frame's body, in their order (module ``codec``)."""

    expert_weights: int
    scales: int
    expert_ids: int
    rows: int
    pairs_per_row: int


def part_bytes(header: FrameHeader) -> PartBytes:
    """Lay out the body that a header announces; a refusal's message stands where rows do."""
    kind, row_format, detail, _, hidden_size, _, _, num_rows, num_pairs = header
    if kind == "refusal":
        return PartBytes(0, 0, 0, num_pairs, 0)
    if kind == "bulk":
        return PartBytes(0, 0, 0, 0, 0)
    scales = num_rows * scale_bytes(row_format)
    rows = num_rows * row_bytes(hidden_size, row_format) - scales
    if kind != "dispatch":
        return PartBytes(0, scales, 0, rows, 0)
    assert isinstance(detail, Combine)
    weights = EXPERT_WEIGHT_BYTES * num_pairs if detail.mode == "partial_sums" else 0
    ids = EXPERT_ID_BYTES * (num_pairs + num_pairs % 2)  # an even number, so that float32 rows stay aligned
    return PartBytes(weights, scales, ids, rows, ROW_METADATA_BYTES * num_rows)


def pack_fields(header: FrameHeader) -> bytes:
    """Return the header without its checksum, 28 bytes."""
    detail = 0
    if isinstance(header.detail, Combine):
        detail = _COMBINE_CODES[header.detail]
    elif header.detail is not None:
        detail = _REASON_CODES[header.detail]
    return _FIELDS.pack(
        _MAGIC,
        _VERSION,
        _KIND_CODES[header.kind],
        _FORMAT_CODES[header.row_format],
        detail,
        header.layer_index,
        header.hidden_size,
        header.epoch,
        header.request_id,
        header.num_rows,
        header.num_pairs,
    )


def pack_checksum(checksum: int) -> bytes:
    """Return the last four bytes of a header."""
    return _CHECKSUM.pack(checksum)


def unpack_checksum(frame: memoryview) -> int:
    """Return the checksum that a frame of at least :data:`HEADER_BYTES` claims."""
    return int(_CHECKSUM.unpack_from(frame, _FIELDS.size)[0])


def peek_request_id(frame: memoryview) -> int:
    """Return the request id that a frame claims, unchecked; 0 if it is too short to have one."""
    return int(_CHECKSUM.unpack_from(frame, _REQUEST_ID_OFFSET)[0]) if len(frame) >= HEADER_BYTES else 0


def is_bulk(frame: memoryview) -> bool:
    """Whether a frame claims to be a bulk frame, unchecked."""
    return len(frame) == HEADER_BYTES and frame[_KIND_OFFSET] == _KIND_CODES["bulk"]


def read_header(frame: memoryview, limits: FrameLimits) -> tuple[FrameHeader, PartBytes]:
    """Read and check the header of a whole received frame; its checksum is checked elsewhere.

    Args:
        frame: header and body, as unsigned bytes.
        limits: the largest sizes that the receiver takes.
    Returns:
        the header, and the layout of the body.
    Raises:
        FrameError: the frame is too short or long, of another protocol or version, or claims sizes that
            break a limit or do not match its length.
    """
    if len(frame) < HEADER_BYTES:
        raise _refusal(f"{len(frame)} bytes are shorter than the header of {HEADER_BYTES}")
    if len(frame) > limits.max_frame_bytes:
        raise _over_limit("frame bytes", len(frame), limits.max_frame_bytes)
    magic, version, kind_code, format_code, detail_code, layer_index, hidden_size, *numbers = _FIELDS.unpack_from(frame)
    epoch, request_id, num_rows, num_pairs = numbers
    if magic != _MAGIC:
        raise _refusal(f"magic is {magic!r}, expected {_MAGIC!r}")
    if version != _VERSION:
        raise _refusal(f"version is {version}, this program speaks {_VERSION}; run one version on every host")
    kind, row_format = _KINDS.get(kind_code), _FORMATS.get(format_code)
    if kind is None:
        raise _refusal(f"kind code {kind_code} is unknown")
    if row_format is None:
        raise _refusal(f"row format code {format_code} is unknown")
    detail = _read_detail(kind, detail_code)
    if kind == "dispatch" or kind == "combine":
        if hidden_size == 0:
            raise _refusal("hidden size is 0")
    elif layer_index or hidden_size or row_format != "int8":
        raise _refusal(f"a {kind} frame with layer {layer_index} and rows of {hidden_size} {row_format} values")
    _check_sizes(kind, num_rows, hidden_size, num_pairs, limits)
    header = FrameHeader(kind, row_format, detail, layer_index, hidden_size, epoch, request_id, num_rows, num_pairs)
    parts = part_bytes(header)
    claimed = HEADER_BYTES + sum(parts)
    if len(frame) != claimed:
        raise _refusal(f"{len(frame)} bytes arrived, the header announces {claimed}")
    return header, parts


def _read_detail(kind: FrameKind, code: int) -> Combine | RefusalReason | None:
    detail: Combine | RefusalReason | None = None
    if kind == "dispatch":
        detail = _COMBINES.get(code)
    elif kind == "refusal":
        detail = _REASONS.get(code)
    elif code == 0:
        return None
    if detail is None:
        raise _refusal(f"combine code {code} is not one of a {kind} frame")
    return detail


def _check_sizes(kind: FrameKind, num_rows: int, hidden_size: int, num_pairs: int, limits: FrameLimits) -> None:
    max_num_rows = max_num_pairs = 0
    if kind == "dispatch":
        max_num_rows, max_num_pairs = limits.max_num_rows, limits.max_num_pairs
    elif kind == "combine":
        max_num_rows = limits.max_num_rows
    elif kind == "refusal":
        max_num_pairs = MAX_MESSAGE_BYTES
    elif kind == "bulk":
        max_num_pairs = limits.max_frame_bytes
    if num_rows > max_num_rows:
        raise _over_limit("rows", num_rows, max_num_rows)
    if hidden_size > limits.max_hidden_size:
        raise _over_limit("hidden size", hidden_size, limits.max_hidden_size)
    if num_pairs > max_num_pairs:
        raise _over_limit("pairs", num_pairs, max_num_pairs)


def _over_limit(name: str, value: int, limit: int) -> FrameError:
    return _refusal(f"{name}: {value} given, the limit is {limit}")


def _refusal(problem: str) -> FrameError:
    return FrameError(f"frame refused: {problem}. Send the rows again.")
