"""Ternary codes out of the bytes of a tile, four bytes to a 32-bit register.

The layouts are drawn in :mod:`moe_bitnet.tiles`. Codes are weight + 1, so the product of rows x with codes is too large
by the sum of x over the inputs; whoever sums takes that off again, once, in integers.

2 bits: a field is masked where it stands. Field p holds ``4^p · code``, and the integer sum is shifted back at the end.
The highest field would not fit into int8 (2 · 64 = 128), but with its top bit flipped it is ``64 · (code - 2)``, which
does. So a register of 16 weights costs four logical instructions, which LLVM and ptxas do on whole registers.

Base 3: a digit is ``q - 3 · (q // 3)``, and a third of a byte is ``(85 · q + 85) >> 8``, exact below 256. Two bytes
fit into one multiplication of 32 bits, which no Triton operation can say: hence PTX, and the same arithmetic in Triton
for the interpreter and for other GPUs.
"""

import triton
import triton.language as tl

BASE3_PTX = tl.constexpr(
    """
    {
    .reg .b32 even, odd, third1, third2, third3;
    and.b32     even, $5, 0x00ff00ff;
    prmt.b32    odd, $5, 0, 0x4341;
    mad.lo.u32  even, even, 85, 0x00550055;
    mad.lo.u32  odd, odd, 85, 0x00550055;
    prmt.b32    third1, even, odd, 0x7351;
    and.b32     even, third1, 0x00ff00ff;
    prmt.b32    odd, third1, 0, 0x4341;
    mad.lo.u32  even, even, 85, 0x00550055;
    mad.lo.u32  odd, odd, 85, 0x00550055;
    prmt.b32    third2, even, odd, 0x7351;
    and.b32     even, third2, 0x00ff00ff;
    prmt.b32    odd, third2, 0, 0x4341;
    mad.lo.u32  even, even, 85, 0x00550055;
    mad.lo.u32  odd, odd, 85, 0x00550055;
    prmt.b32    third3, even, odd, 0x7351;
    and.b32     even, third3, 0x00ff00ff;
    prmt.b32    odd, third3, 0, 0x4341;
    mad.lo.u32  even, even, 85, 0x00550055;
    mad.lo.u32  odd, odd, 85, 0x00550055;
    prmt.b32    $4, even, odd, 0x7351;
    mad.lo.u32  $0, third1, 0xfffffffd, $5;
    mad.lo.u32  $1, third2, 0xfffffffd, third1;
    mad.lo.u32  $2, third3, 0xfffffffd, third2;
    mad.lo.u32  $3, $4, 0xfffffffd, third3;
    }
    """
)
"""``$5`` is four bytes, ``$0 … $4`` their digits from the lowest. 0xfffffffd is -3: no byte borrows from its neighbour,
because three thirds of a byte are at most the byte. Every instruction is run in a test, on all bytes."""


@triton.jit
def two_bit_fields(lines):
    """Return the four fields of 2-bit lines as int8: ``c0``, ``4·c1``, ``16·c2`` and ``64·(c3 - 2)`` for codes c.

    Args:
        lines: uint8, any shape.
    """
    field0 = (lines & 0x03).to(tl.int8, bitcast=True)
    field1 = (lines & 0x0C).to(tl.int8, bitcast=True)
    field2 = (lines & 0x30).to(tl.int8, bitcast=True)
    field3 = ((lines & 0xC0) ^ 0x80).to(tl.int8, bitcast=True)
    return field0, field1, field2, field3


@triton.jit
def third(quotient):
    """Return ``quotient // 3`` of uint16 numbers below 256."""
    return (quotient * 85 + 85) >> 8


@triton.jit
def base3_digits(lines, USE_PTX: tl.constexpr):
    """Return the five digits of base-3 lines as int8, the lowest first.

    Args:
        lines: uint8, any shape; a byte is at most 242.
        USE_PTX: an NVIDIA GPU runs this; otherwise in Triton's own operations.
    """
    if USE_PTX:
        digit0, digit1, digit2, digit3, digit4 = tl.inline_asm_elementwise(
            asm=BASE3_PTX,
            constraints="=&r,=&r,=&r,=&r,=&r,r",
            args=[lines],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        quotient0 = lines.to(tl.uint16)
        quotient1 = third(quotient0)
        quotient2 = third(quotient1)
        quotient3 = third(quotient2)
        quotient4 = third(quotient3)
        digit0 = (quotient0 - 3 * quotient1).to(tl.int8)
        digit1 = (quotient1 - 3 * quotient2).to(tl.int8)
        digit2 = (quotient2 - 3 * quotient3).to(tl.int8)
        digit3 = (quotient3 - 3 * quotient4).to(tl.int8)
        digit4 = quotient4.to(tl.int8)
    return digit0, digit1, digit2, digit3, digit4
