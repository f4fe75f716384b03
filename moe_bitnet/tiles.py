"""Ternary weights laid out for vector units: what kernels read, converted once when a model is loaded.

Portable bytes (``packing.py``) enter, tiles of the same bits a weight leave; :func:`untile` undoes it exactly.
Rows are cut into blocks of 64 and inputs into *quads* of 4, the four int8 values that one lane of an integer
dot product takes. A 64-byte *line* is one vector register: byte ``4·r + i`` belongs to lane r (0 … 15) and input i
of a quad (0 … 3). Codes are weight + 1.

``2bit``: one line a quad; bit field p of a byte is the code of row ``16·p + r``::

    bits     7 6          5 4          3 2          1 0
    row      48 + r       32 + r       16 + r       r            input 4·q + i of line q

``base3``: four lines hold the five quads of a *group* of 20 inputs. Line j is the 2-bit line of quad j with its
four codes as base-3 digits, and carries a quarter of the fifth quad's codes as the highest digit::

    byte = c(r) + 3·c(16 + r) + 9·c(32 + r) + 27·c(48 + r) + 81·d(16·j + r)

    c: input 20·g + 4·j + i          d: input 20·g + 16 + i

Rows beyond the last and inputs beyond the last hold weight 0. Blocks of a matrix follow each other, so a
thread that multiplies one row block reads memory strictly forward, and every output row stays in its own lane.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bitnet.packing import Layout, PackedTernary, pack

ROWS_PER_BLOCK = 64
LINE_BYTES = 64
INPUTS_PER_UNIT: dict[Layout, int] = {"2bit": 4, "base3": 20}
"""Inputs that the smallest whole piece of a block covers: a quad, or a group of five."""
_LINES_PER_UNIT: dict[Layout, int] = {"2bit": 1, "base3": 4}


@dataclass(frozen=True)
class TiledTernary:
    """Ternary matrices as kernels read them.

    Attributes:
        tiles: uint8 ``[..., num_row_blocks(out_features), block_bytes(in_features, layout)]``.
        weight_scale: float32 ``[..., 1, 1]``; it multiplies.
        out_features: rows of a matrix.
        in_features: columns of a matrix.
        layout: bits a weight, ``"2bit"`` or ``"base3"``.
    """

    tiles: Tensor
    weight_scale: Tensor
    out_features: int
    in_features: int
    layout: Layout

    @property
    def num_bytes(self) -> int:
        """Bytes of the tiles and their scales."""
        return self.tiles.numel() + 4 * self.weight_scale.numel()

    def unpack(self) -> Tensor:
        """Return the weights as int8 in {-1, 0, 1}, ``[..., out_features, in_features]``."""
        return _unpack(self.tiles, self.out_features, self.in_features, self.layout)

    def select(self, index: int) -> "TiledTernary":
        """Return the matrix at ``index`` of the first dimension, as a view."""
        return TiledTernary(
            self.tiles[index], self.weight_scale[index], self.out_features, self.in_features, self.layout
        )


TernaryMatrix = PackedTernary | TiledTernary
"""What every ternary kernel takes: portable bytes, or tiles."""


def num_row_blocks(out_features: int) -> int:
    """Return the blocks that hold ``out_features`` rows."""
    return -(-out_features // ROWS_PER_BLOCK)


def block_bytes(in_features: int, layout: Layout) -> int:
    """Return the bytes of one block of rows with ``in_features`` inputs."""
    return -(-in_features // INPUTS_PER_UNIT[layout]) * _LINES_PER_UNIT[layout] * LINE_BYTES


def tile(packed: PackedTernary) -> TiledTernary:
    """Lay portable bytes out for kernels.

    Args:
        packed: ``[..., out_features, in_features]``, checked with :func:`moe_bitnet.packing.check_packed`.
    """
    codes = packed.unpack() + 1  # [..., out, in]
    out_features, in_features = packed.out_features, packed.in_features
    unit = INPUTS_PER_UNIT[packed.layout]
    codes = F.pad(codes, (0, -in_features % unit, 0, -out_features % ROWS_PER_BLOCK), value=1)
    leading, num_blocks = codes.shape[:-2], codes.shape[-2] // ROWS_PER_BLOCK
    codes = codes.reshape(*leading, num_blocks, 4, 16, codes.shape[-1] // unit, unit // 4, 4)
    codes = codes.movedim((-5, -4), (-3, -2))  # [..., blocks, units, quads of a unit, 4 (p), 16 (r), 4 (i)]
    if packed.layout == "base3":
        low, high = codes[..., :4, :, :, :], codes[..., 4, :, :, :]  # high: [..., 4 (j), 16 (r), 4 (i)]
        digits = torch.cat((low, high.unsqueeze(-3)), dim=-3)  # [..., 4 (j), 5 digits, 16, 4]
        places = 3 ** torch.arange(5, dtype=torch.int16, device=codes.device)
    else:
        digits = codes
        places = 4 ** torch.arange(4, dtype=torch.int16, device=codes.device)
    lines = (digits.to(torch.int16) * places[:, None, None]).sum(dim=-3).to(torch.uint8)
    return TiledTernary(lines.flatten(-4), packed.weight_scale, out_features, in_features, packed.layout)


def untile(tiled: TiledTernary) -> PackedTernary:
    """Undo :func:`tile`: return the portable bytes."""
    weight_packed = pack(tiled.unpack(), tiled.layout)
    return PackedTernary(weight_packed, tiled.weight_scale, tiled.in_features, tiled.layout)


def _unpack(tiles: Tensor, out_features: int, in_features: int, layout: Layout) -> Tensor:
    num_units = tiles.shape[-1] // (_LINES_PER_UNIT[layout] * LINE_BYTES)
    # [..., blocks, units, lines, 16 (r), 4 (i)]
    lines = tiles.reshape(*tiles.shape[:-1], num_units, _LINES_PER_UNIT[layout], 16, 4)
    radix, count = (3, 5) if layout == "base3" else (4, 4)
    places = radix ** torch.arange(count, dtype=torch.int16, device=tiles.device)
    digits = lines.to(torch.int16).unsqueeze(-3) // places[:, None, None] % radix  # [..., lines, digits, 16, 4]
    if layout == "base3":
        low, high = digits[..., :4, :, :], digits[..., 4, :, :]  # high: [..., 4 (j), 16 (r), 4 (i)]
        codes = torch.cat((low, high.unsqueeze(-4)), dim=-4)  # [..., units, 5 quads, 4 (p), 16, 4]
    else:
        codes = digits
    codes = codes.movedim((-3, -2), (-5, -4))  # [..., blocks, 4 (p), 16 (r), units, quads, 4 (i)]
    weights = codes.flatten(-3).flatten(-4, -2).to(torch.int8) - 1
    return weights[..., :out_features, :in_features]
