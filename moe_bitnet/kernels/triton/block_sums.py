"""The loop over inputs: bytes of weights and int8 rows enter, exact int32 sums leave.

A program multiplies ``ROW_BLOCKS`` blocks of 64 weight rows by ``BLOCK_TOKENS`` rows of x. The weights are the left
operand of each product, so that unpacked weights go from registers into the tensor cores, and few rows of x waste
little (their side may be 8 wide). A step takes 32 lines of each block, a contiguous run of 2 KiB::

    2-bit   32 quads            K = 128                one product a bit field
    base3   8 groups of 20      K = 128 + 32           one product a digit, and the fifth digit in four parts

Field or digit p of ``ROW_BLOCKS`` blocks gives a ``[16 · ROW_BLOCKS, K]`` operand: rows 16·p … 16·p + 15 of each block.
The sum of field 3 in 2 bits is at most 128 · 128 · 131,071 < 2^31 (see :data:`MAX_IN_FEATURES`), so nothing overflows.
"""

import triton
import triton.language as tl

from moe_bitnet.kernels.triton.unpack import base3_digits, two_bit_fields

LINES_PER_STEP = tl.constexpr(32)
INPUTS_PER_STEP_TWO_BIT = tl.constexpr(128)
INPUTS_PER_STEP_BASE3 = tl.constexpr(160)


@triton.jit
def load_inputs(x, start, inputs, in_features, num_rows, BLOCK_TOKENS: tl.constexpr):
    """Load int8 ``[K, BLOCK_TOKENS]``; zero beyond the last input and the last row.

    Args:
        x: pointer to the first row of the tile.
        start: input at which the step begins.
        inputs: int32 ``[K]``, which inputs, counted from there.
        in_features: inputs of a row.
        num_rows: rows of the tile.
        BLOCK_TOKENS: rows to load.
    """
    tokens = tl.arange(0, BLOCK_TOKENS)
    mask = (inputs < in_features - start)[:, None] & (tokens < num_rows)[None, :]
    return tl.load(x + start + (tokens[None, :] * in_features + inputs[:, None]), mask=mask, other=0)


@triton.jit
def load_lines(tiles, start, block_bytes, num_blocks, ROW_BLOCKS: tl.constexpr):
    """Load the lines of a step, uint8 ``[ROW_BLOCKS, 2048]``, in the order of memory.

    Args:
        tiles: pointer to the first row block of the program.
        start: byte of a block at which the step begins.
        block_bytes: bytes of a block.
        num_blocks: row blocks that there are.
        ROW_BLOCKS: row blocks to load.
    """
    blocks = tl.arange(0, ROW_BLOCKS)
    places = tl.arange(0, LINES_PER_STEP * 64)
    mask = (blocks < num_blocks)[:, None] & (places < block_bytes - start)[None, :]
    return tl.load(tiles + start + (blocks[:, None] * block_bytes + places[None, :]), mask=mask, other=0)


@triton.jit
def add_two_bit(lines, x, sum0, sum1, sum2, sum3, ROW_BLOCKS: tl.constexpr):
    """Add the products of one step to the four sums of raw fields."""
    quads = lines.reshape(ROW_BLOCKS, LINES_PER_STEP, 16, 4).permute(0, 2, 1, 3)  # [blocks, r, q, i]
    field0, field1, field2, field3 = two_bit_fields(quads.reshape(ROW_BLOCKS * 16, LINES_PER_STEP * 4))
    sum0 = tl.dot(field0, x, sum0, out_dtype=tl.int32)
    sum1 = tl.dot(field1, x, sum1, out_dtype=tl.int32)
    sum2 = tl.dot(field2, x, sum2, out_dtype=tl.int32)
    sum3 = tl.dot(field3, x, sum3, out_dtype=tl.int32)
    return sum0, sum1, sum2, sum3


@triton.jit
def add_base3(lines, x, x_fifth, sum0, sum1, sum2, sum3, ROW_BLOCKS: tl.constexpr, USE_PTX: tl.constexpr):
    """Add the products of one step to the four sums of codes.

    Args:
        lines: uint8 ``[ROW_BLOCKS, 2048]``.
        x: int8 ``[128, BLOCK_TOKENS]``, the first 16 inputs of each group.
        x_fifth: int8 ``[32, BLOCK_TOKENS]``, the last 4 inputs of each group.
        sum0: int32 ``[16 · ROW_BLOCKS, BLOCK_TOKENS]``, as are the others.
        sum1: of digit 1.
        sum2: of digit 2.
        sum3: of digit 3.
        ROW_BLOCKS: blocks of rows.
        USE_PTX: see :func:`base3_digits`.
    """
    groups: tl.constexpr = LINES_PER_STEP // 4
    rows: tl.constexpr = ROW_BLOCKS * 16
    quads = lines.reshape(ROW_BLOCKS, LINES_PER_STEP, 16, 4).permute(0, 2, 1, 3)  # [blocks, r, 4·g + j, i]
    digit0, digit1, digit2, digit3, digit4 = base3_digits(quads.reshape(rows, LINES_PER_STEP * 4), USE_PTX)
    sum0 = tl.dot(digit0, x, sum0, out_dtype=tl.int32)
    sum1 = tl.dot(digit1, x, sum1, out_dtype=tl.int32)
    sum2 = tl.dot(digit2, x, sum2, out_dtype=tl.int32)
    sum3 = tl.dot(digit3, x, sum3, out_dtype=tl.int32)
    # the fifth quad: digit 4 of line j belongs to rows 16·j + r
    fifth = digit4.reshape(rows, groups, 2, 2, 4).permute(0, 1, 4, 2, 3)  # [rows, g, i, j // 2, j % 2]
    even, odd = tl.split(fifth.reshape(rows, groups * 4, 2, 2))
    part0, part2 = tl.split(even)
    part1, part3 = tl.split(odd)
    sum0 = tl.dot(part0, x_fifth, sum0, out_dtype=tl.int32)
    sum1 = tl.dot(part1, x_fifth, sum1, out_dtype=tl.int32)
    sum2 = tl.dot(part2, x_fifth, sum2, out_dtype=tl.int32)
    sum3 = tl.dot(part3, x_fifth, sum3, out_dtype=tl.int32)
    return sum0, sum1, sum2, sum3


@triton.jit
def add_row_sums(x, sums):
    """Add the sum of each column of ``x`` to all 16 rows of ``sums``: a product with ones.

    With few rows the tensor cores idle, and this costs a fifth product; a reduction would cost many more instructions.
    """
    ones = tl.full([16, x.shape[0]], 1, tl.int8)
    return tl.dot(ones, x, sums, out_dtype=tl.int32)


@triton.jit
def to_ternary_sums(sum0, sum1, sum2, sum3, row_sums, IS_BASE3: tl.constexpr):
    """Turn sums over fields or codes into sums over weights.

    Args:
        sum0: int32 ``[16 · ROW_BLOCKS, BLOCK_TOKENS]``, as are the others.
        sum1: of field 1.
        sum2: of field 2.
        sum3: of field 3.
        row_sums: int32 ``[BLOCK_TOKENS]``, sums of x over the same inputs.
        IS_BASE3: which layout.
    """
    excess = row_sums[None, :]
    if IS_BASE3:
        return sum0 - excess, sum1 - excess, sum2 - excess, sum3 - excess
    else:  # Triton compiles one of the branches, and types what follows a return otherwise
        return sum0 - excess, (sum1 >> 2) - excess, (sum2 >> 4) - excess, (sum3 >> 6) + excess


@triton.jit
def block_sums(
    x,
    num_rows,
    in_features,
    first_tiles,
    second_tiles,
    num_blocks,
    block_bytes,
    first_step,
    last_step,
    row_sums,
    IS_BASE3: tl.constexpr,
    IS_PAIR: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Multiply rows of x by row blocks of one matrix, or of two matrices that share x.

    Pointers are scalars and offsets from them int32, which keeps them out of registers: a tile is smaller than 2^31.

    Args:
        x: int8 pointer to the first row of the tile.
        num_rows: rows from there that are ours; more than ``BLOCK_TOKENS`` count as that many.
        in_features: inputs of a row.
        first_tiles: uint8 pointer to the first row block of the program in the first matrix.
        second_tiles: the same for the second matrix; unused without ``IS_PAIR``.
        num_blocks: row blocks from there that there are.
        block_bytes: bytes of a block.
        first_step: step at which to begin.
        last_step: step before which to end.
        row_sums: int32 ``[BLOCK_TOKENS]``, the sums of x to take off; unused with ``SUMS_ROWS``.
        IS_BASE3: which layout.
        IS_PAIR: multiply by both matrices.
        SUMS_ROWS: sum x here, over the steps of this program.
        ROW_BLOCKS: blocks of 64 rows.
        BLOCK_TOKENS: rows of x.
        USE_PTX: see :func:`base3_digits`.
    Returns:
        Eight int32 ``[16 · ROW_BLOCKS, BLOCK_TOKENS]``: rows 0 … 15, 16 … 31, 32 … 47 and 48 … 63 of each block, of the
        first matrix, then of the second (zeros without ``IS_PAIR``).
    """
    zeros = tl.zeros([ROW_BLOCKS * 16, BLOCK_TOKENS], tl.int32)
    a0, a1, a2, a3 = zeros, zeros, zeros, zeros
    b0, b1, b2, b3 = zeros, zeros, zeros, zeros
    own_sums = tl.zeros([16, BLOCK_TOKENS], tl.int32)
    inputs = tl.arange(0, LINES_PER_STEP * 4)
    fifths = tl.arange(0, LINES_PER_STEP)
    fifths = fifths // 4 * 20 + 16 + fifths % 4
    for step in range(first_step, last_step):
        byte = step * (LINES_PER_STEP * 64)
        lines = load_lines(first_tiles, byte, block_bytes, num_blocks, ROW_BLOCKS)
        if IS_BASE3:
            start = step * INPUTS_PER_STEP_BASE3
            quads = inputs // 16 * 20 + inputs % 16
            tile = load_inputs(x, start, quads, in_features, num_rows, BLOCK_TOKENS)
            fifth = load_inputs(x, start, fifths, in_features, num_rows, BLOCK_TOKENS)
            a0, a1, a2, a3 = add_base3(lines, tile, fifth, a0, a1, a2, a3, ROW_BLOCKS, USE_PTX)
            if IS_PAIR:
                lines = load_lines(second_tiles, byte, block_bytes, num_blocks, ROW_BLOCKS)
                b0, b1, b2, b3 = add_base3(lines, tile, fifth, b0, b1, b2, b3, ROW_BLOCKS, USE_PTX)
            if SUMS_ROWS:
                own_sums = add_row_sums(fifth, add_row_sums(tile, own_sums))
        else:
            start = step * INPUTS_PER_STEP_TWO_BIT
            tile = load_inputs(x, start, inputs, in_features, num_rows, BLOCK_TOKENS)
            a0, a1, a2, a3 = add_two_bit(lines, tile, a0, a1, a2, a3, ROW_BLOCKS)
            if IS_PAIR:
                lines = load_lines(second_tiles, byte, block_bytes, num_blocks, ROW_BLOCKS)
                b0, b1, b2, b3 = add_two_bit(lines, tile, b0, b1, b2, b3, ROW_BLOCKS)
            if SUMS_ROWS:
                own_sums = add_row_sums(tile, own_sums)
    if SUMS_ROWS:
        row_sums = tl.max(own_sums, axis=0)  # all 16 rows are equal
    a0, a1, a2, a3 = to_ternary_sums(a0, a1, a2, a3, row_sums, IS_BASE3)
    if IS_PAIR:
        b0, b1, b2, b3 = to_ternary_sums(b0, b1, b2, b3, row_sums, IS_BASE3)
    return a0, a1, a2, a3, b0, b1, b2, b3
