"""What rows look like on their way between workers: one uint8 matrix a message, one line a row.

::

    dispatch            home  → owner   [ row: H int8 + float32 scale, or H floats | K float32 weights | K ids ]
    combine             owner → home    [ partial sum: H floats ]
    combine gradient    home  → owner   [ gradient of the partial sum: H floats ]
    dispatch gradient   owner → home    [ gradient of the row: H floats | gradients of K weights: K float32 ]

Rows of ternary and binary experts travel as int8, which changes nothing: they are integers already. Rows of float
experts travel in the dtype that the experts' products round them to. Partial sums and the gradients of rows travel in
the exchange dtype; weights and their gradients always in float32. Ids take one byte, two if a worker holds more than
127 experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.transport.meter import ByteKind
from moe_bitnet.experts import ExpertInput

_WEIGHT_BYTES = 4
_SCALE_BYTES = 4


@dataclass(frozen=True)
class RowLayout:
    """Sizes of a row in all four messages.

    Attributes:
        hidden_size: H.
        top_k: K.
        row_dtype: of dispatched rows; ``torch.int8`` has a scale beside it.
        exchange_dtype: of partial sums and gradients.
        id_dtype: of expert ids; ``torch.int8`` or ``torch.int16``.
    """

    hidden_size: int
    top_k: int
    row_dtype: torch.dtype
    exchange_dtype: torch.dtype
    id_dtype: torch.dtype = torch.int8

    @property
    def dispatch_sizes(self) -> dict[ByteKind, int]:
        """Bytes of a dispatched row."""
        payload = self.hidden_size * self.row_dtype.itemsize + (_SCALE_BYTES if self.has_scale else 0)
        return {"payload": payload, "metadata": self.top_k * (_WEIGHT_BYTES + self.id_dtype.itemsize)}

    @property
    def combine_sizes(self) -> dict[ByteKind, int]:
        """Bytes of a partial sum, and of its gradient."""
        return {"payload": self.hidden_size * self.exchange_dtype.itemsize}

    @property
    def gradient_sizes(self) -> dict[ByteKind, int]:
        """Bytes of the gradient of a dispatched row."""
        return {**self.combine_sizes, "metadata": self.top_k * _WEIGHT_BYTES}

    @property
    def has_scale(self) -> bool:
        """Whether rows are int8."""
        return self.row_dtype == torch.int8

    def encode_dispatch(self, rows: ExpertInput, weights: Tensor, local_ids: Tensor) -> Tensor:
        """Join rows ``[n, H]``, float32 weights ``[n, K]`` and ids ``[n, K]`` to a message ``[n, bytes]``."""
        parts = [_bytes_of(rows.rows.to(self.row_dtype))]
        if rows.activation_scale is not None:
            parts.append(_bytes_of(rows.activation_scale))
        return torch.cat([*parts, _bytes_of(weights), _bytes_of(local_ids.to(self.id_dtype))], dim=1)

    def decode_dispatch(self, message: Tensor) -> tuple[ExpertInput, Tensor, Tensor]:
        """Return what :meth:`encode_dispatch` joined: rows as float32, weights, and int64 ids."""
        row_bytes = self.hidden_size * self.row_dtype.itemsize
        scale_bytes = _SCALE_BYTES if self.has_scale else 0
        sizes = [row_bytes, scale_bytes, self.top_k * _WEIGHT_BYTES, self.top_k * self.id_dtype.itemsize]
        rows, scale, weights, ids = torch.split(message, sizes, dim=1)
        return (
            ExpertInput(
                _values_of(rows, self.row_dtype).float(), _values_of(scale, torch.float32) if scale_bytes else None
            ),
            _values_of(weights, torch.float32),
            _values_of(ids, self.id_dtype).long(),
        )

    def encode_sums(self, sums: Tensor) -> Tensor:
        """Turn partial sums ``[n, H]``, or their gradients, into a message."""
        return _bytes_of(sums.to(self.exchange_dtype))

    def decode_sums(self, message: Tensor) -> Tensor:
        """Return what :meth:`encode_sums` was given, as float32."""
        return _values_of(message, self.exchange_dtype).float()

    def encode_gradients(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Join the gradients of rows ``[n, H]`` and of weights ``[n, K]`` to a message."""
        return torch.cat((_bytes_of(rows.to(self.exchange_dtype)), _bytes_of(weights)), dim=1)

    def decode_gradients(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`encode_gradients` joined, as float32."""
        rows, weights = torch.split(
            message, [self.hidden_size * self.exchange_dtype.itemsize, self.top_k * _WEIGHT_BYTES], dim=1
        )
        return _values_of(rows, self.exchange_dtype).float(), _values_of(weights, torch.float32)


def id_dtype_for(num_local_experts: int) -> torch.dtype:
    """Return the dtype of expert ids where a worker holds at most that many experts."""
    return torch.int8 if num_local_experts <= 2**7 else torch.int16


def _bytes_of(values: Tensor) -> Tensor:
    if not len(values):  # whose strides may be anything
        return values.new_empty(0, values.shape[1] * values.dtype.itemsize, dtype=torch.uint8)
    return values.contiguous().view(torch.uint8)


def _values_of(part: Tensor, dtype: torch.dtype) -> Tensor:
    # a copy, also of a single row: that of a wider message counts as contiguous, but starts anywhere
    return torch.empty(part.shape, dtype=torch.uint8, device=part.device).copy_(part).view(dtype)
