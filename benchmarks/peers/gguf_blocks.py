"""Random weights in four block formats of GGUF, valid but of no meaning.

A block holds codes and one float16 scale d. Layouts, bytes in order (ggml's block structs):

    TQ2_0  256 weights: 64 bytes of four 2-bit codes 0, 1, 2; d             2.06 bits a weight
    TQ1_0  256 weights: 48 bytes of five trits, 4 bytes of four trits; d    1.69
    Q4_0    32 weights: d; 16 bytes of two 4-bit codes, offset 8            4.5
    Q8_0    32 weights: d; 32 signed bytes                                  8.5
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_bitnet.errors import ShapeError

BlockFormat = Literal["TQ2_0", "TQ1_0", "Q4_0", "Q8_0"]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockLayout:
    """Sizes of one block.

    Attributes:
        num_weights: weights in a block.
        num_code_bytes: bytes of codes, beside two of scale.
        scale_comes_first: the scale is before the codes.
        code_variance: variance of uniformly drawn codes, so that a scale can undo it.
    """

    num_weights: int
    num_code_bytes: int
    scale_comes_first: bool
    code_variance: float

    @property
    def num_bytes(self) -> int:
        """Bytes of one block."""
        return self.num_code_bytes + 2


LAYOUTS: dict[str, BlockLayout] = {
    "TQ2_0": BlockLayout(256, 64, scale_comes_first=False, code_variance=2 / 3),
    "TQ1_0": BlockLayout(256, 52, scale_comes_first=False, code_variance=2 / 3),
    "Q4_0": BlockLayout(32, 16, scale_comes_first=True, code_variance=(16**2 - 1) / 12 + 0.25),  # mean -0.5
    "Q8_0": BlockLayout(32, 32, scale_comes_first=True, code_variance=(256**2 - 1) / 12 + 0.25),
}


def random_blocks(block_format: BlockFormat, num_rows: int, num_columns: int, generator: np.random.Generator) -> Bytes:
    """Draw a matrix ``[num_rows, num_columns]`` whose products keep the size of their input.

    Returns:
        uint8 ``[num_rows, bytes per row]``, the form in which GGUF stores it.
    Raises:
        ShapeError: a row is not a whole number of blocks.
    """
    layout = LAYOUTS[block_format]
    if num_columns % layout.num_weights:
        raise ShapeError(
            f"{block_format}: a row has {num_columns} weights, and a block holds {layout.num_weights}. "
            f"Give a multiple of {layout.num_weights}."
        )
    num_blocks = num_rows * num_columns // layout.num_weights
    blocks = np.empty((num_blocks, layout.num_bytes), dtype=np.uint8)
    scale = np.float16((num_columns * layout.code_variance) ** -0.5)
    scale_at = 0 if layout.scale_comes_first else layout.num_code_bytes
    codes_at = 2 if layout.scale_comes_first else 0
    blocks[:, scale_at : scale_at + 2] = np.frombuffer(scale.astype("<f2").tobytes(), dtype=np.uint8)
    blocks[:, codes_at : codes_at + layout.num_code_bytes] = _random_codes(block_format, num_blocks, generator)
    return blocks.reshape(num_rows, -1)


def _random_codes(block_format: BlockFormat, num_blocks: int, generator: np.random.Generator) -> Bytes:
    num_code_bytes = LAYOUTS[block_format].num_code_bytes
    if block_format == "TQ2_0":
        four_codes = np.array(
            [a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)], dtype=np.uint8
        )
        return four_codes[generator.integers(0, 81, (num_blocks, num_code_bytes), dtype=np.uint8)]
    if block_format == "TQ1_0":
        five_trits = generator.integers(0, 243, (num_blocks, 48), dtype=np.uint8)
        four_trits = generator.integers(0, 81, (num_blocks, 4), dtype=np.uint8) * np.uint8(3)
        numbers = np.concatenate([five_trits, four_trits], axis=1).astype(np.uint16)
        # A byte holds its number of five trits as a fraction of 256, rounded up; multiplying by 3 moves a trit out.
        return ((numbers * 256 + 242) // 243).astype(np.uint8)
    return generator.integers(0, 256, (num_blocks, num_code_bytes), dtype=np.uint8)
