"""The two messages of a MoE layer, as tensors, and how many bytes each part of them weighs.

A :class:`DispatchFrame` carries token rows from the home device to one expert
host; a :class:`CombineFrame` carries that host's expert outputs back, one row
for each (row, expert) pair and in the same order. Bytes are split in three:

* payload: the rows, and the scales of int8 rows;
* metadata: expert ids and row indices;
* header: :data:`HEADER_BYTES` in front of every frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.transport.row_format import EXPERT_METADATA_BYTES, RowFormat, row_bytes
from moe_bitnet.errors import ConfigError, ShapeError

HEADER_BYTES = 32
"""Size of a frame header, see :mod:`cluster.transport.header`."""

_FORMAT_OF_DTYPE: dict[torch.dtype, RowFormat] = {
    torch.int8: "int8",
    torch.float16: "float16",
    torch.float32: "float32",
}
_LARGEST_U32 = 2**32 - 1


@dataclass(frozen=True, eq=False)
class DispatchFrame:
    """Rows for the experts of one host, each row sent once however many experts work on it.

    Attributes:
        layer_index: MoE layer, 0 to 2**32 - 1.
        epoch: number of the placement that the sender follows, 0 to 2**32 - 1.
        rows: ``[n, H]``, int8, float16 or float32.
        expert_ids: ``[m]`` int32, global within the layer, ascending.
        row_indices: ``[m]`` int32; pair ``i`` asks expert ``expert_ids[i]`` for row ``row_indices[i]``.
        scales: ``[n, 1]`` float32 for int8 rows (``x = rows * scales``), ``None`` otherwise.

    Raises:
        ShapeError: a shape or dtype differs from the above.
        ConfigError: ``layer_index`` or ``epoch`` is out of range.
    """

    layer_index: int
    epoch: int
    rows: Tensor
    expert_ids: Tensor
    row_indices: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        _check_numbers("DispatchFrame", self.layer_index, self.epoch)
        _check_rows("DispatchFrame", self.rows, (torch.int8, torch.float16, torch.float32))
        if (self.scales is not None) != (self.rows.dtype == torch.int8):
            given = "no scales" if self.scales is None else "scales"
            raise ShapeError(
                f"DispatchFrame: {self.rows.dtype} rows came with {given}. "
                f"Give scales with int8 rows, and only with them."
            )
        if self.scales is not None:
            _check_tensor("DispatchFrame: scales", self.scales, (len(self.rows), 1), torch.float32)
        num_pairs = self.expert_ids.numel()
        _check_tensor("DispatchFrame: expert_ids", self.expert_ids, (num_pairs,), torch.int32)
        _check_tensor("DispatchFrame: row_indices", self.row_indices, (num_pairs,), torch.int32)

    @property
    def row_format(self) -> RowFormat:
        """Format of the rows on the wire."""
        return _FORMAT_OF_DTYPE[self.rows.dtype]


@dataclass(frozen=True, eq=False)
class CombineFrame:
    """Expert outputs on the way home, one row for each pair of the dispatch frame, in its order.

    Attributes:
        layer_index: MoE layer, 0 to 2**32 - 1.
        epoch: number of the placement that the host follows, 0 to 2**32 - 1.
        rows: ``[m, H]``, float16 or float32, not yet multiplied by the expert weights.

    Raises:
        ShapeError: a shape or dtype differs from the above.
        ConfigError: ``layer_index`` or ``epoch`` is out of range.
    """

    layer_index: int
    epoch: int
    rows: Tensor

    def __post_init__(self) -> None:
        _check_numbers("CombineFrame", self.layer_index, self.epoch)
        _check_rows("CombineFrame", self.rows, (torch.float16, torch.float32))

    @property
    def row_format(self) -> RowFormat:
        """Format of the rows on the wire."""
        return _FORMAT_OF_DTYPE[self.rows.dtype]


def payload_bytes(frame: DispatchFrame | CombineFrame) -> int:
    """Return the bytes of a frame's rows and scales."""
    num_rows, hidden_size = frame.rows.shape
    return num_rows * row_bytes(hidden_size, frame.row_format)


def metadata_bytes(frame: DispatchFrame | CombineFrame) -> int:
    """Return the bytes of a frame's expert ids and row indices; a combine frame has none."""
    return EXPERT_METADATA_BYTES * len(frame.expert_ids) if isinstance(frame, DispatchFrame) else 0


def _check_numbers(what: str, layer_index: int, epoch: int) -> None:
    for name, value in (("layer_index", layer_index), ("epoch", epoch)):
        if not 0 <= value <= _LARGEST_U32:
            raise ConfigError(f"{what}: {name} is {value}; allowed are 0 to {_LARGEST_U32}.")


def _check_rows(what: str, rows: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if rows.dim() != 2 or rows.shape[1] < 1 or rows.dtype not in dtypes:
        raise ShapeError(
            f"{what}: rows are {list(rows.shape)} of {rows.dtype}. "
            f"Give [num_rows, hidden_size] of {' or '.join(str(dtype) for dtype in dtypes)}."
        )


def _check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ShapeError(f"{what} are {list(tensor.shape)} of {tensor.dtype}. Give {list(shape)} of {dtype}.")
