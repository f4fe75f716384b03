"""The messages of a MoE layer, as tensors, and how many bytes each part of them weighs.

A :class:`DispatchFrame` carries token rows from the home to one expert host; a :class:`CombineFrame` carries that
host's answer: one row for each (row, expert) pair, or one weighted sum for each row, as the dispatch frame asked.
A :class:`RefusalFrame` says why there is no answer; a :class:`ProbeFrame` asks whether anyone is there; a
:class:`BulkFrame` announces one of the first two that comes another way.

Bytes are split in three:

* payload: the rows, and the scales of int8 rows;
* metadata: expert ids, experts a row and, for sums, expert weights;
* header: :data:`HEADER_BYTES` in front of every frame.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from cluster.transport.row_format import (
    EXPERT_ID_BYTES,
    ROW_METADATA_BYTES,
    Combine,
    RowFormat,
    pair_metadata_bytes,
    row_bytes,
)
from moe_bitnet.errors import ConfigError, ShapeError

HEADER_BYTES = 32
"""Size of a frame header, see :mod:`cluster.transport.header`."""

MAX_EXPERT_ID = 2**16 - 1
MAX_PAIRS_PER_ROW = 2**8 - 1
_LARGEST_U16, _LARGEST_U32 = 2**16 - 1, 2**32 - 1
_FEW = 64  # so many numbers are looked at faster in a list than by calls of NumPy

_FORMAT_OF_DTYPE: dict[torch.dtype, RowFormat] = {
    torch.int8: "int8",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}

RefusalReason = Literal["protocol", "stale plan", "request", "failure", "bulk"]
"""``"protocol"``: the bytes are no frame, and the connection is dropped; ``"stale plan"``: another epoch;
``"request"``: what was asked cannot be done here; ``"failure"``: the host itself failed; ``"bulk"``: a bulk channel
broke, and the frame is to come by the socket."""


@dataclass(frozen=True, eq=False)
class DispatchFrame:
    """Rows for the experts of one host, each with the experts that work on it.

    Attributes:
        layer_index: MoE layer, 0 to 2**16 - 1.
        epoch: number of the plan that the sender follows, 0 to 2**32 - 1.
        rows: ``[n, H]``, int8 or float.
        scales: ``[n, 1]`` float32 for int8 rows (``x = rows * scales``), ``None`` otherwise.
        expert_ids: ``[m]`` int64, global within the layer; those of row 0 first, then those of row 1, and so on.
        pairs_per_row: ``[n]`` int64, experts of each row, 1 to 255; they add up to m.
        expert_weights: ``[m]`` float32 where the host is to sum, else ``None``.
        combine: what is to come back.

    Raises:
        ShapeError: a shape, dtype or value differs from the above.
        ConfigError: ``layer_index`` or ``epoch`` is out of range.
    """

    layer_index: int
    epoch: int
    rows: Tensor
    scales: Tensor | None
    expert_ids: Tensor
    pairs_per_row: Tensor
    expert_weights: Tensor | None
    combine: Combine

    def __post_init__(self) -> None:
        _check_numbers("DispatchFrame", self.layer_index, self.epoch)
        _check_rows("DispatchFrame", self.rows, self.scales)
        num_pairs = self.expert_ids.numel()
        _check_tensor("DispatchFrame: expert_ids", self.expert_ids, (num_pairs,), torch.int64)
        _check_tensor("DispatchFrame: pairs_per_row", self.pairs_per_row, self.rows.shape[:1], torch.int64)
        if (self.expert_weights is not None) != (self.combine.mode == "partial_sums"):
            raise ShapeError("DispatchFrame: give expert weights where the host is to sum, and only there.")
        if self.expert_weights is not None:
            _check_tensor("DispatchFrame: expert_weights", self.expert_weights, (num_pairs,), torch.float32)
        problem = pair_problem(self.expert_ids, self.pairs_per_row)
        if problem is not None:
            raise ShapeError(f"DispatchFrame: {problem}.")

    @property
    def row_format(self) -> RowFormat:
        """Format of the rows on the wire."""
        return _FORMAT_OF_DTYPE[self.rows.dtype]

    @property
    def num_answer_rows(self) -> int:
        """Rows of the answer: one a pair, or one a row."""
        return len(self.expert_ids) if self.combine.mode == "rows" else len(self.rows)


@dataclass(frozen=True, eq=False)
class CombineFrame:
    """Expert outputs on the way home, in the order of the dispatch frame.

    Attributes:
        layer_index: MoE layer, 0 to 2**16 - 1.
        epoch: number of the plan that the host follows, 0 to 2**32 - 1.
        rows: ``[m, H]`` unweighted outputs of all pairs, or ``[n, H]`` weighted sums of all rows.
        scales: ``[m or n, 1]`` float32 for int8 rows, ``None`` otherwise.

    Raises:
        ShapeError: a shape or dtype differs from the above.
        ConfigError: ``layer_index`` or ``epoch`` is out of range.
    """

    layer_index: int
    epoch: int
    rows: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        _check_numbers("CombineFrame", self.layer_index, self.epoch)
        _check_rows("CombineFrame", self.rows, self.scales)

    @property
    def row_format(self) -> RowFormat:
        """Format of the rows on the wire."""
        return _FORMAT_OF_DTYPE[self.rows.dtype]

    def values(self) -> Tensor:
        """Return the rows as float32."""
        rows = self.rows.float()
        return rows if self.scales is None else rows * self.scales


@dataclass(frozen=True)
class RefusalFrame:
    """The answer to a frame that got none.

    Attributes:
        reason: which kind of refusal it is.
        message: for people; at most 4096 bytes of UTF-8 travel.
        epoch: of the host.
    """

    reason: RefusalReason
    message: str
    epoch: int = 0


@dataclass(frozen=True)
class ProbeFrame:
    """Asks a host whether it is there; the same frame comes back, with the newest epoch of the host."""

    epoch: int = 0


FrameOfRows = TypeVar("FrameOfRows", DispatchFrame, CombineFrame)


def frame_of_checked(kind: type[FrameOfRows], **attributes: object) -> FrameOfRows:
    """Make a frame without its checks: of parts whose shapes, dtypes and values are known to be right.

    Args:
        kind: class of the frame.
        attributes: all of its attributes, by name.
    """
    frame = object.__new__(kind)
    vars(frame).update(attributes)
    return frame


@dataclass(frozen=True)
class BulkFrame:
    """Announces a frame that comes by a bulk channel (module ``bulk``).

    Attributes:
        num_bytes: of the frame, 1 to 2**32 - 1.
        channel_id: which channel.
    """

    num_bytes: int
    channel_id: int


def payload_bytes(frame: DispatchFrame | CombineFrame) -> int:
    """Return the bytes of a frame's rows and scales."""
    num_rows, hidden_size = frame.rows.shape
    return num_rows * row_bytes(hidden_size, frame.row_format)


def metadata_bytes(frame: DispatchFrame | CombineFrame) -> int:
    """Return the bytes of what a dispatch frame says about its rows; a combine frame has none."""
    if isinstance(frame, CombineFrame):
        return 0
    return len(frame.rows) * ROW_METADATA_BYTES + len(frame.expert_ids) * pair_metadata_bytes(frame.combine.mode)


def padding_bytes(frame: DispatchFrame | CombineFrame) -> int:
    """Return the bytes that keep a dispatch frame's rows aligned: one more expert id after an odd number of them."""
    return EXPERT_ID_BYTES * (len(frame.expert_ids) % 2) if isinstance(frame, DispatchFrame) else 0


def pair_problem(expert_ids: Tensor, pairs_per_row: Tensor) -> str | None:
    """Say what is wrong with the (row, expert) pairs of a frame, or nothing."""
    num_pairs, fewest, most = _sum_and_range(pairs_per_row)
    if num_pairs != expert_ids.numel():
        return f"the rows have {num_pairs} experts, {expert_ids.numel()} expert ids are given"
    if not 1 <= fewest <= most <= MAX_PAIRS_PER_ROW:
        return f"a row has {fewest} to {most} experts; allowed are 1 to {MAX_PAIRS_PER_ROW}"
    _, smallest, largest = _sum_and_range(expert_ids)
    if not 0 <= smallest <= largest <= MAX_EXPERT_ID:
        return f"expert ids reach from {smallest} to {largest}; allowed are 0 to {MAX_EXPERT_ID}"
    return None


def _sum_and_range(integers: Tensor) -> tuple[int, int, int]:
    """Return sum, smallest and largest; 0, 1 and 1 of none."""
    if integers.numel() <= _FEW:
        few = integers.tolist()
        return sum(few), min(few, default=1), max(few, default=1)
    values = integers.numpy()
    return int(values.sum()), int(values.min()), int(values.max())


def _check_numbers(what: str, layer_index: int, epoch: int) -> None:
    if not 0 <= layer_index <= _LARGEST_U16:
        raise ConfigError(f"{what}: layer_index is {layer_index}; allowed are 0 to {_LARGEST_U16}.")
    if not 0 <= epoch <= _LARGEST_U32:
        raise ConfigError(f"{what}: epoch is {epoch}; allowed are 0 to {_LARGEST_U32}.")


def _check_rows(what: str, rows: Tensor, scales: Tensor | None) -> None:
    shape = rows.shape
    if len(shape) != 2 or not 1 <= shape[1] <= _LARGEST_U16 or rows.dtype not in _FORMAT_OF_DTYPE:
        raise ShapeError(
            f"{what}: rows are {list(shape)} of {rows.dtype}. Give [num_rows, hidden_size] with at most "
            f"{_LARGEST_U16} values a row, of {' or '.join(str(dtype) for dtype in _FORMAT_OF_DTYPE)}."
        )
    if (scales is not None) != (rows.dtype == torch.int8):
        given = "no scales" if scales is None else "scales"
        raise ShapeError(
            f"{what}: {rows.dtype} rows came with {given}. Give scales with int8 rows, and only with them."
        )
    if scales is not None:
        _check_tensor(f"{what}: scales", scales, (shape[0], 1), torch.float32)


def _check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ShapeError(f"{what} are {list(tensor.shape)} of {tensor.dtype}. Give {list(shape)} of {dtype}.")
