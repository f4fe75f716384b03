"""The embedding and the head of a packed model in fewer bits: float32, bfloat16, or int8 with a scale a row.

They are float in training and stay so in checkpoints. For inference an int8 head reads a quarter of the bytes; it
rounds each row of the matrix and the hidden state to 8 bits, so logits change; by how much depends on the model.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_bitnet.errors import ConfigError
from moe_bitnet.quantization import quantize_activation

TableFormat = Literal["float32", "bfloat16", "int8"]
TABLE_FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)


@dataclass(frozen=True)
class Table:
    """A matrix ``[num_rows, features]`` whose rows are looked up or multiplied.

    Attributes:
        values: float32, bfloat16 or int8 ``[num_rows, features]``.
        row_scale: float32 ``[num_rows]`` for int8, else ``None``; it multiplies.
        row_sum: int32 ``[num_rows]``, sums of the integers of each row for int8, else ``None``.
    """

    values: Tensor
    row_scale: Tensor | None = None
    row_sum: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the values, scales and sums."""
        tensors = [tensor for tensor in (self.values, self.row_scale, self.row_sum) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def dequantize(self) -> Tensor:
        """Return the matrix in float32."""
        values = self.values.float()
        return values if self.row_scale is None else values * self.row_scale[:, None]


def make_table(weight: Tensor, table_format: TableFormat) -> Table:
    """Convert an embedding or a head.

    Args:
        weight: float ``[num_rows, features]``.
        table_format: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
    Raises:
        ConfigError: the format is unknown.
    """
    if table_format not in TABLE_FORMATS:
        raise ConfigError(f"table format is {table_format!r}; allowed are {', '.join(TABLE_FORMATS)}.")
    weight = weight.detach()
    if table_format == "int8":
        values, row_scale = quantize_activation(weight)
        return Table(values.contiguous(), row_scale.flatten(), values.sum(dim=-1, dtype=torch.int32))
    return Table(weight.to(torch.float32 if table_format == "float32" else torch.bfloat16).contiguous())
