"""Ternary weights as bytes: the two portable layouts of a checkpoint.

``2bit``, four codes a byte; a code is the weight plus one, the first weight in the lowest bits::

    bit      7 6   5 4   3 2   1 0
    weight   w3+1  w2+1  w1+1  w0+1          each in {0, 1, 2}; 3 is invalid

``base3``, five trits a byte (1.6 bits a weight; log2 3 = 1.585 is the floor)::

    byte = (w0+1) + 3·(w1+1) + 9·(w2+1) + 27·(w3+1) + 81·(w4+1)          0 … 242; more is invalid

Both run along ``in_features``; the last byte of a row is filled up with weight 0 (code 1).
Kernels may rearrange bytes for their vector unit when they load; files stay in these layouts.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bitnet.errors import CheckpointError, ConfigError, ShapeError

Layout = Literal["2bit", "base3"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
WEIGHTS_PER_BYTE: dict[Layout, int] = {"2bit": 4, "base3": 5}
_RADIX: dict[Layout, int] = {"2bit": 4, "base3": 3}


@dataclass(frozen=True)
class PackedTernary:
    """Ternary matrices as bytes, with the scale of each.

    Attributes:
        weight_packed: uint8 ``[..., out_features, packed_width(in_features, layout)]``.
        weight_scale: float32 ``[..., 1, 1]``; it multiplies.
        in_features: columns of a matrix before packing.
        layout: ``"2bit"`` or ``"base3"``.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    in_features: int
    layout: Layout

    @property
    def out_features(self) -> int:
        """Rows of a matrix."""
        return self.weight_packed.shape[-2]

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights and their scales."""
        return self.weight_packed.numel() + 4 * self.weight_scale.numel()

    def unpack(self) -> Tensor:
        """Return the weights as int8 in {-1, 0, 1}, ``[..., out_features, in_features]``."""
        return unpack(self.weight_packed, self.in_features, self.layout)

    def select(self, index: int) -> "PackedTernary":
        """Return the matrix at ``index`` of the first dimension, as a view."""
        return PackedTernary(self.weight_packed[index], self.weight_scale[index], self.in_features, self.layout)


def packed_width(in_features: int, layout: Layout) -> int:
    """Return the bytes of one packed row of ``in_features`` weights."""
    return -(-in_features // WEIGHTS_PER_BYTE[layout])


def check_layout(layout: str) -> Layout:
    """Return ``layout`` if it is one of ours.

    Raises:
        ConfigError: it is not.
    """
    for known in LAYOUTS:
        if layout == known:
            return known
    raise ConfigError(f"layout is {layout!r}; allowed are {', '.join(LAYOUTS)}.")


def pack(weight_ternary: Tensor, layout: Layout) -> Tensor:
    """Pack ternary weights along their last dimension.

    Args:
        weight_ternary: int8 ``[..., in_features]`` with values in {-1, 0, 1}.
        layout: ``"2bit"`` or ``"base3"``.
    Returns:
        uint8 ``[..., packed_width(in_features, layout)]``.
    Raises:
        ShapeError: a value is not in {-1, 0, 1}.
    """
    if ((weight_ternary < -1) | (weight_ternary > 1)).any():
        raise ShapeError("pack: weights must be -1, 0 or 1. Quantize them first with quantize_weight.")
    count = WEIGHTS_PER_BYTE[layout]
    padding = -weight_ternary.shape[-1] % count
    codes = F.pad(weight_ternary, (0, padding)).to(torch.int16) + 1
    groups = codes.reshape(*codes.shape[:-1], -1, count)  # [..., bytes, count]
    return torch.sum(groups * _place_values(layout, groups.device), dim=-1).to(torch.uint8)


def unpack(weight_packed: Tensor, in_features: int, layout: Layout) -> Tensor:
    """Undo :func:`pack`.

    Args:
        weight_packed: uint8 ``[..., packed_width(in_features, layout)]``, checked with :func:`check_packed`.
        in_features: weights of a row before packing.
        layout: the layout it was packed in.
    Returns:
        int8 ``[..., in_features]`` with values in {-1, 0, 1}.
    """
    weights = F.embedding(weight_packed.int(), _weights_of_byte(layout, weight_packed.device))  # [..., bytes, count]
    return weights.flatten(-2).narrow(-1, 0, in_features)


def check_packed(weight_packed: Tensor, in_features: int, layout: Layout, name: str) -> None:
    """Refuse bytes that :func:`pack` cannot have written.

    Args:
        weight_packed: the bytes to check.
        in_features: weights of a row before packing.
        layout: the layout they claim.
        name: what to call the tensor in an error.
    Raises:
        CheckpointError: wrong dtype or width, or a byte that encodes no weights.
    """
    width = packed_width(in_features, layout)
    if weight_packed.dtype != torch.uint8 or weight_packed.shape[-1] != width:
        raise CheckpointError(
            f"{name}: packed weights are {weight_packed.dtype} with rows of {weight_packed.shape[-1]} bytes; "
            f"{in_features} inputs in layout {layout} need uint8 rows of {width} bytes. Pack the model again."
        )
    # in 2 bits a code of 3 has both bits set
    is_invalid = weight_packed & (weight_packed >> 1) & 0b01010101 if layout == "2bit" else weight_packed > 242
    if is_invalid.any():
        raise CheckpointError(
            f"{name}: holds a byte that encodes no ternary weights in layout {layout}. The file is damaged."
        )


def _place_values(layout: Layout, device: torch.device) -> Tensor:
    return _RADIX[layout] ** torch.arange(WEIGHTS_PER_BYTE[layout], dtype=torch.int16, device=device)


def _weights_of_byte(layout: Layout, device: torch.device) -> Tensor:
    """Return the weights of each byte, int8 ``[256, WEIGHTS_PER_BYTE]``: a lookup is fast, divisions are not."""
    every_byte = torch.arange(256, dtype=torch.int16, device=device).unsqueeze(-1)
    codes = every_byte // _place_values(layout, device) % _RADIX[layout]
    return (codes - 1).to(torch.int8)
