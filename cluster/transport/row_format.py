"""What one row of hidden states weighs on the wire; shared by the codec and the cost model."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_bitnet.errors import ConfigError

RowFormat = Literal["int8", "float16", "bfloat16", "float32"]
"""Formats of a row: ``"int8"`` carries one float32 scale beside each row."""

CombineMode = Literal["rows", "partial_sums"]
"""What a host sends back: one row for each (token, expert) pair, or one weighted sum for each token."""

EXPERT_ID_BYTES = 2
"""Metadata of one (token, expert) pair in a dispatch frame: the expert's id, uint16."""

EXPERT_WEIGHT_BYTES = 4
"""More metadata of a pair where the host sums: the expert's float32 weight."""

ROW_METADATA_BYTES = 1
"""Metadata of one row in a dispatch frame: how many experts work on it, uint8."""

_VALUE_BYTES: dict[RowFormat, int] = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Combine:
    """How expert outputs come home.

    Attributes:
        mode: ``"rows"`` leaves the sum to the home, in the order of one process; ``"partial_sums"`` sends less.
        row_format: format of the rows. Only float32 rows keep every bit.

    Raises:
        ConfigError: a value is not allowed.
    """

    mode: CombineMode = "partial_sums"
    row_format: RowFormat = "float32"

    def __post_init__(self) -> None:
        if self.mode not in get_args(CombineMode):
            raise ConfigError(f"combine is {self.mode!r}; allowed are {', '.join(get_args(CombineMode))}.")
        row_bytes(1, self.row_format)

    @property
    def is_exact(self) -> bool:
        """Whether logits are those of one process bit for bit."""
        return self.mode == "rows" and self.row_format == "float32"


def scale_bytes(row_format: RowFormat) -> int:
    """Return the bytes of a row's scale: 4 for int8, else 0."""
    return _SCALE_BYTES if row_format == "int8" else 0


def row_bytes(hidden_size: int, row_format: RowFormat) -> int:
    """Return the payload bytes of one row: ``4H``, ``2H``, or ``H + 4`` for int8 with its scale.

    Args:
        hidden_size: H, values in a row.
        row_format: how the values are stored.
    Raises:
        ConfigError: ``row_format`` is unknown.
    """
    if row_format not in _VALUE_BYTES:
        raise ConfigError(f"row format is {row_format!r}; allowed are {', '.join(_VALUE_BYTES)}.")
    return hidden_size * _VALUE_BYTES[row_format] + scale_bytes(row_format)


def pair_metadata_bytes(mode: CombineMode) -> int:
    """Return the metadata bytes of one (token, expert) pair in a dispatch frame."""
    return EXPERT_ID_BYTES + (EXPERT_WEIGHT_BYTES if mode == "partial_sums" else 0)
