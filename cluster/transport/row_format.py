"""What one row of hidden states weighs on the wire; shared by the codec and the cost model."""

from typing import Literal

from moe_bitnet.errors import ConfigError

RowFormat = Literal["int8", "float16", "float32"]
"""Formats of a row: ``"int8"`` carries one float32 scale beside each row."""

CombineFormat = Literal["float16", "float32"]
"""Formats of an expert output; an int8 way back would cost accuracy and is not offered."""

EXPERT_METADATA_BYTES = 8
"""Metadata of one (row, expert) pair in a dispatch frame: int32 expert id and int32 row index."""


def row_bytes(hidden_size: int, row_format: RowFormat) -> int:
    """Return the payload bytes of one row: ``4H``, ``2H``, or ``H + 4`` for int8 with its scale.

    Args:
        hidden_size: H, values in a row.
        row_format: how the values are stored.
    Raises:
        ConfigError: ``row_format`` is unknown.
    """
    if row_format == "float32":
        return 4 * hidden_size
    if row_format == "float16":
        return 2 * hidden_size
    if row_format == "int8":
        return hidden_size + 4
    raise ConfigError(f"row format is {row_format!r}; allowed are int8, float16 and float32.")
