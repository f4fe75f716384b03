"""Frames to bytes and back: fixed layout, no pickle, every size checked before use.

    dispatch   header | expert weights float32 [m] (sums only) | scales float32 [n] (int8 only)
                      | expert ids uint16 [m, and a zero if m is odd] | rows [n, H] | experts a row uint8 [n]
    combine    header | scales float32 [n] (int8 only) | rows [n, H]
    refusal    header | message, UTF-8
    probe      header
    bulk       header

All fields are little endian, and so must the host be: the body is copied from and viewed as tensors without swapping
bytes. Wide parts come first, so every part is aligned in a buffer that is itself aligned.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.transport.frames import (
    HEADER_BYTES,
    MAX_PAIRS_PER_ROW,
    BulkFrame,
    CombineFrame,
    DispatchFrame,
    ProbeFrame,
    RefusalFrame,
    frame_of_checked,
)
from cluster.transport.header import (
    MAX_MESSAGE_BYTES,
    FrameHeader,
    FrameLimits,
    PartBytes,
    pack_checksum,
    pack_fields,
    read_header,
    unpack_checksum,
)
from cluster.transport.row_format import EXPERT_ID_BYTES, Combine, RowFormat
from moe_bitnet.errors import FrameError

Frame = DispatchFrame | CombineFrame | RefusalFrame | ProbeFrame | BulkFrame
Buffer = bytes | bytearray | memoryview
Integers = npt.NDArray[np.int64]

_DTYPES: dict[RowFormat, type[np.generic]] = {
    "int8": np.int8,
    "float16": np.float16,
    "bfloat16": np.int16,  # NumPy has no bfloat16; its 16 bits travel unchanged
    "float32": np.float32,
}


class Received(NamedTuple):
    """A frame that arrived.

    Attributes:
        frame: what it says.
        request_id: of the request that it is, or answers.
    """

    frame: Frame
    request_id: int


def encode(frame: Frame, request_id: int = 0) -> bytes:
    """Write a frame as bytes.

    Args:
        frame: rows, scales and weights on any device, ids and counts on the CPU; strided in any way.
        request_id: 0 to 2**32 - 1; an answer repeats that of its request.
    Returns:
        Header and body.
    """
    if isinstance(frame, DispatchFrame):
        return _join(_dispatch_header(frame, request_id), _dispatch_parts(frame))
    if isinstance(frame, CombineFrame):
        num_rows, hidden_size = frame.rows.shape
        header = FrameHeader(
            "combine", frame.row_format, None, frame.layer_index, hidden_size, frame.epoch, request_id, num_rows, 0
        )
        scales = [] if frame.scales is None else [_bytes_of(frame.scales)]
        return _join(header, [*scales, _bytes_of(frame.rows)])
    if isinstance(frame, RefusalFrame):
        message = frame.message.encode(errors="replace")[:MAX_MESSAGE_BYTES]
        header = FrameHeader("refusal", "int8", frame.reason, 0, 0, frame.epoch, request_id, 0, len(message))
        return _join(header, [message])
    if isinstance(frame, BulkFrame):
        return _join(FrameHeader("bulk", "int8", None, 0, 0, frame.channel_id, request_id, 0, frame.num_bytes), [])
    return _join(FrameHeader("probe", "int8", None, 0, 0, frame.epoch, request_id, 0, 0), [])


def decode(buffer: Buffer, limits: FrameLimits) -> Received:
    """Read a frame of any kind.

    Args:
        buffer: one whole frame, contiguous. A writable buffer aligned to four bytes (a ``bytearray``) is viewed,
            not copied, and must not change while the frame lives; any other is copied once, after the checks.
        limits: the largest sizes to take.
    Returns:
        The frame, on the CPU. Which experts and layers exist is for the receiver to check.
    Raises:
        FrameError: the buffer is truncated, oversized, altered or no frame.
    """
    frame = memoryview(buffer).cast("B")
    header, parts = read_header(frame, limits)
    _check_checksum(frame)
    return Received(_view_parts(_writable(frame), header, parts), header.request_id)


def _view_parts(frame: Buffer, header: FrameHeader, parts: PartBytes) -> Frame:
    """View the parts of a frame's body as tensors; their sizes are those that the header announces."""
    if header.kind == "dispatch":
        return _view_dispatch(frame, header, parts)
    if header.kind == "combine":
        return frame_of_checked(
            CombineFrame,
            layer_index=header.layer_index,
            epoch=header.epoch,
            rows=_view_rows(frame, header, HEADER_BYTES + parts.scales),
            scales=_view_scales(frame, header, HEADER_BYTES),
        )
    if header.kind == "refusal":
        assert isinstance(header.detail, str)
        return RefusalFrame(header.detail, bytes(frame[HEADER_BYTES:]).decode(errors="replace"), header.epoch)
    return BulkFrame(header.num_pairs, header.epoch) if header.kind == "bulk" else ProbeFrame(header.epoch)


def _view_dispatch(frame: Buffer, header: FrameHeader, parts: PartBytes) -> DispatchFrame:
    assert isinstance(header.detail, Combine)
    num_pairs = header.num_pairs
    scales = HEADER_BYTES + parts.expert_weights
    ids = scales + parts.scales
    rows = ids + parts.expert_ids
    # [m], or [m + 1] with padding
    padded_ids = np.ndarray(parts.expert_ids // EXPERT_ID_BYTES, np.uint16, frame, ids).astype(np.int64)
    pairs_per_row = np.ndarray(header.num_rows, np.uint8, frame, rows + parts.rows).astype(np.int64)
    _check_pairs(padded_ids, pairs_per_row, num_pairs)
    weights = None
    if header.detail.mode == "partial_sums":
        weights = torch.from_numpy(np.ndarray(num_pairs, np.float32, frame, HEADER_BYTES))
    return frame_of_checked(
        DispatchFrame,
        layer_index=header.layer_index,
        epoch=header.epoch,
        rows=_view_rows(frame, header, rows),
        scales=_view_scales(frame, header, scales),
        expert_ids=torch.from_numpy(padded_ids[:num_pairs]),
        pairs_per_row=torch.from_numpy(pairs_per_row),
        expert_weights=weights,
        combine=header.detail,
    )


def _check_pairs(padded_ids: Integers, pairs_per_row: Integers, num_pairs: int) -> None:
    """Check the experts of each row, and the padding after their ids."""
    total = int(np.add.reduce(pairs_per_row))
    if total != num_pairs:
        problem = f"the rows have {total} experts, {num_pairs} expert ids are given"
    elif np.count_nonzero(pairs_per_row) != len(pairs_per_row):
        problem = f"a row has 0 to {pairs_per_row.max()} experts; allowed are 1 to {MAX_PAIRS_PER_ROW}"
    elif num_pairs % 2 and padded_ids[-1] != 0:
        problem = "its padding is not 0"
    else:
        return
    raise FrameError(f"frame refused: {problem}. The sender is at fault; look at its log.")


def _dispatch_header(frame: DispatchFrame, request_id: int) -> FrameHeader:
    num_rows, hidden_size = frame.rows.shape
    return FrameHeader(
        "dispatch",
        frame.row_format,
        frame.combine,
        frame.layer_index,
        hidden_size,
        frame.epoch,
        request_id,
        num_rows,
        frame.expert_ids.numel(),
    )


def _dispatch_parts(frame: DispatchFrame) -> list[memoryview]:
    num_pairs = frame.expert_ids.numel()
    ids = np.zeros(num_pairs + num_pairs % 2, np.uint16)
    ids[:num_pairs] = frame.expert_ids.numpy()
    parts = [_bytes_of(part) for part in (frame.expert_weights, frame.scales) if part is not None]
    return [*parts, ids.data, _bytes_of(frame.rows), frame.pairs_per_row.numpy().astype(np.uint8).data]


def _join(header: FrameHeader, body: Sequence[bytes | memoryview]) -> bytes:
    fields = pack_fields(header)
    checksum = zlib.crc32(fields)
    for part in body:
        checksum = zlib.crc32(part, checksum)
    return b"".join([fields, pack_checksum(checksum), *body])


def _check_checksum(frame: memoryview) -> None:
    checksum = zlib.crc32(frame[HEADER_BYTES:], zlib.crc32(frame[: HEADER_BYTES - 4]))
    claimed = unpack_checksum(frame)
    if checksum != claimed:
        raise FrameError(
            f"frame refused: checksum is {checksum:08x}, the header says {claimed:08x}; it was altered on the way. "
            f"Send the rows again."
        )


def _writable(frame: memoryview) -> Buffer:
    """Return a frame's bytes, or copy them: torch warns about read-only memory, wide values need aligned addresses."""
    is_aligned = np.frombuffer(frame, np.uint32, 1).flags.aligned
    return frame if is_aligned and not frame.readonly else bytearray(frame)


def _view_rows(frame: Buffer, header: FrameHeader, start: int) -> Tensor:
    shape = (header.num_rows, header.hidden_size)
    rows = torch.from_numpy(np.ndarray(shape, _DTYPES[header.row_format], frame, start))
    return rows.view(torch.bfloat16) if header.row_format == "bfloat16" else rows


def _view_scales(frame: Buffer, header: FrameHeader, start: int) -> Tensor | None:
    if header.row_format != "int8":
        return None
    return torch.from_numpy(np.ndarray((header.num_rows, 1), np.float32, frame, start))


def _bytes_of(tensor: Tensor) -> memoryview:
    """View a tensor's values, in one piece and on the CPU."""
    values = tensor.contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    array: npt.NDArray[Any] = values.numpy(force=True)
    return array.data
