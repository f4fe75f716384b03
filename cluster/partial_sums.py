"""Rows before they travel: weighted sums of the experts' outputs, and rounding to a format."""

import torch
from torch import Tensor

from cluster.transport.row_format import RowFormat
from moe_bitnet.kernels import select

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def sum_pairs(outputs: Tensor, expert_weights: Tensor, pairs_per_row: Tensor) -> Tensor:
    """Weigh the outputs of all pairs and add up those of each row, in the order of its pairs.

    Args:
        outputs: float32 ``[m, H]``, the pairs of row 0 first.
        expert_weights: float32 ``[m]``.
        pairs_per_row: int64 ``[n]``, at least 1 each.
    Returns:
        float32 ``[n, H]``.
    """
    weighted = outputs * expert_weights.unsqueeze(1)
    if len(outputs) == len(pairs_per_row):
        return weighted
    # one row after the other is added to its sum: NumPy's reduceat takes another order, and ten times as long
    sums = torch.zeros(len(pairs_per_row), outputs.shape[1])
    return sums.index_add_(0, torch.repeat_interleave(pairs_per_row), weighted)


def to_format(rows: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor | None]:
    """Round float rows ``[n, H]`` to the format in which they travel; returns them and the scales of int8 rows."""
    if row_format == "int8":
        quantized, scales = select("quantize_activation", rows.device.type)(rows)
        return quantized, scales
    return rows.to(_DTYPES[row_format]), None
