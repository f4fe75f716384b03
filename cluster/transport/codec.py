"""Frames to bytes and back: fixed layout, no pickle, every size checked before use.

    dispatch   header | expert_ids int32 [m] | row_indices int32 [m] | scales float32 [n] (int8 only) | rows [n, H]
    combine    header | rows [n, H]

All fields are little endian, and so must the host be: the body is copied from and
viewed as tensors without swapping bytes. Parts of four-byte values come first, so
every part is aligned in a buffer that is itself aligned.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from cluster.transport.frames import HEADER_BYTES, CombineFrame, DispatchFrame
from cluster.transport.header import (
    FrameHeader,
    FrameKind,
    FrameLimits,
    pack_checksum,
    pack_fields,
    read_header,
    unpack_checksum,
)
from cluster.transport.row_format import RowFormat
from moe_bitnet.errors import ClusterError, ShapeError

_DTYPES: dict[RowFormat, torch.dtype] = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}


def encode(frame: DispatchFrame | CombineFrame) -> bytes:
    """Write a frame as bytes.

    Args:
        frame: tensors on any device, strided in any way.
    Returns:
        Header and body; the body is ``payload_bytes(frame) + metadata_bytes(frame)`` long.
    Raises:
        ShapeError: expert ids are negative or not ascending, or a row index names no row.
    """
    num_rows, hidden_size = frame.rows.shape
    if isinstance(frame, DispatchFrame):
        problem = _pair_problem(frame.expert_ids, frame.row_indices, num_rows)
        if problem is not None:
            raise ShapeError(f"encode: {problem}. Sort the pairs by expert and index the frame's own rows.")
        kind: FrameKind = "dispatch"
        num_pairs = len(frame.expert_ids)
        tensors = [frame.expert_ids, frame.row_indices, *([] if frame.scales is None else [frame.scales]), frame.rows]
    else:
        kind, num_pairs, tensors = "combine", 0, [frame.rows]
    fields = pack_fields(
        FrameHeader(kind, frame.row_format, frame.layer_index, frame.epoch, num_rows, hidden_size, num_pairs)
    )
    body = [_bytes_of(tensor) for tensor in tensors]
    checksum = zlib.crc32(fields)
    for part in body:
        checksum = zlib.crc32(part, checksum)
    return b"".join([fields, pack_checksum(checksum), *body])


def decode_dispatch(buffer: bytes | bytearray | memoryview, limits: FrameLimits) -> DispatchFrame:
    """Read a dispatch frame.

    Args:
        buffer: one whole frame, contiguous. A writable buffer aligned to four bytes (a ``bytearray``) is viewed,
            not copied, and must not change while the frame lives; any other is copied once, after the checks.
        limits: the largest sizes to take.
    Returns:
        The frame, on the CPU. Which experts and layers exist is for the receiver to check.
    Raises:
        ClusterError: the buffer is truncated, oversized, altered or no dispatch frame.
    """
    header, body = _open(buffer, "dispatch", limits)
    num_rows, num_pairs = header.num_rows, header.num_pairs
    id_bytes = 4 * num_pairs
    scale_bytes = 4 * num_rows if header.row_format == "int8" else 0
    ids, indices, scale_part, row_part = torch.split(
        body, [id_bytes, id_bytes, scale_bytes, len(body) - 2 * id_bytes - scale_bytes]
    )
    expert_ids, row_indices = ids.view(torch.int32), indices.view(torch.int32)
    problem = _pair_problem(expert_ids, row_indices, num_rows)
    if problem is not None:
        raise ClusterError(f"frame refused: {problem}. The sender is at fault; look at its log.")
    return DispatchFrame(
        layer_index=header.layer_index,
        epoch=header.epoch,
        rows=_view_rows(row_part, header),
        expert_ids=expert_ids,
        row_indices=row_indices,
        scales=scale_part.view(torch.float32).reshape(num_rows, 1) if header.row_format == "int8" else None,
    )


def decode_combine(buffer: bytes | bytearray | memoryview, limits: FrameLimits) -> CombineFrame:
    """Read a combine frame.

    Args:
        buffer: one whole frame, contiguous; viewed or copied as in :func:`decode_dispatch`.
        limits: the largest sizes to take.
    Returns:
        The frame, on the CPU.
    Raises:
        ClusterError: the buffer is truncated, oversized, altered or no combine frame.
    """
    header, body = _open(buffer, "combine", limits)
    return CombineFrame(layer_index=header.layer_index, epoch=header.epoch, rows=_view_rows(body, header))


def _open(buffer: bytes | bytearray | memoryview, kind: FrameKind, limits: FrameLimits) -> tuple[FrameHeader, Tensor]:
    """Check a frame and return its header and its body as uint8 ``[body_bytes]``."""
    frame = memoryview(buffer).cast("B")
    header = read_header(frame, kind, limits)
    fields_end = HEADER_BYTES - 4
    checksum = zlib.crc32(frame[HEADER_BYTES:], zlib.crc32(frame[:fields_end]))
    claimed = unpack_checksum(frame)
    if checksum != claimed:
        raise ClusterError(
            f"frame refused: checksum is {checksum:08x}, the header says {claimed:08x}; it was altered on the way. "
            f"Send the rows again."
        )
    values = np.frombuffer(frame, dtype=np.uint8)
    # torch warns about memory that it may not write to, and needs aligned addresses for wider views
    if frame.readonly or values.ctypes.data % 4:
        values = values.copy()
    return header, torch.from_numpy(values)[HEADER_BYTES:]


def _view_rows(part: Tensor, header: FrameHeader) -> Tensor:
    return part.view(_DTYPES[header.row_format]).reshape(header.num_rows, header.hidden_size)


def _bytes_of(tensor: Tensor) -> memoryview:
    values = tensor.detach().cpu().contiguous().numpy()
    return values.reshape(-1).view(np.uint8).data


def _pair_problem(expert_ids: Tensor, row_indices: Tensor, num_rows: int) -> str | None:
    """Say what is wrong with the (row, expert) pairs of a frame, or nothing."""
    if len(expert_ids) == 0:
        return None
    low, high = int(row_indices.min()), int(row_indices.max())
    if low < 0 or high >= num_rows:
        return f"row indices reach from {low} to {high}, the frame has {num_rows} rows"
    if int(expert_ids[0]) < 0:
        return f"expert id {int(expert_ids[0])} is negative"
    if bool((expert_ids[1:] < expert_ids[:-1]).any()):
        return "expert ids are not in ascending order"
    return None
