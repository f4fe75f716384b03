"""Base-3 tiles to 2-bit tiles, for products of many rows.

A base-3 byte takes six times the instructions of a 2-bit byte to unpack, and every tile of rows unpacks all weights
again. With few rows that hides behind the memory that base 3 saves; with many it would be most of the time, so the
weights are repacked once a call, into memory that lives as long as the call: 2 bits a weight.

Both layouts hold the same 16 rows x 4 inputs at byte ``4·r + i`` of a line (see :mod:`moe_bitnet.tiles`), so a group
of four base-3 lines becomes five 2-bit lines without moving a byte sideways: digits 0 … 3 of a line are its four
fields, and the fifth line takes digit 4 of line j as its field j.
"""

import triton
import triton.language as tl

from moe_bitnet.kernels.triton.unpack import base3_digits

GROUPS_PER_PROGRAM = 16


@triton.jit
def repack_kernel(base3_tiles, two_bit_tiles, base3_bytes, two_bit_bytes, GROUPS: tl.constexpr, USE_PTX: tl.constexpr):
    """Repack ``GROUPS`` groups of one block.

    Args:
        base3_tiles: uint8 ``[blocks, base3_bytes]``.
        two_bit_tiles: uint8 ``[blocks, two_bit_bytes]``; written.
        base3_bytes: bytes of a block, 256 a group.
        two_bit_bytes: bytes of a block, 320 a group; the last group may have fewer lines.
        GROUPS: groups of a program.
        USE_PTX: see :func:`base3_digits`.
    """
    block = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    places = tl.arange(0, 64)[None, :]
    fifth = tl.zeros([GROUPS, 64], tl.uint8)
    for line in tl.static_range(4):
        source = groups * 256 + line * 64 + places
        target = groups * 320 + line * 64 + places
        codes = tl.load(base3_tiles + block * base3_bytes + source, mask=source < base3_bytes, other=0)
        digit0, digit1, digit2, digit3, digit4 = base3_digits(codes, USE_PTX)
        fields = digit0 | (digit1 << 2) | (digit2 << 4) | (digit3 << 6)
        tl.store(
            two_bit_tiles + block * two_bit_bytes + target,
            fields.to(tl.uint8, bitcast=True),
            mask=target < two_bit_bytes,
        )
        fifth |= (digit4 << (2 * line)).to(tl.uint8, bitcast=True)
    target = groups * 320 + 256 + places
    tl.store(two_bit_tiles + block * two_bit_bytes + target, fifth, mask=target < two_bit_bytes)
