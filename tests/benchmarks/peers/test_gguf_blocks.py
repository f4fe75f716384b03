import numpy as np
import pytest

from benchmarks.peers.gguf_blocks import LAYOUTS, random_blocks
from moe_bitnet.errors import ShapeError


@pytest.mark.parametrize("block_format", LAYOUTS)
def test_sizes_are_those_of_the_format(block_format):
    layout = LAYOUTS[block_format]
    blocks = random_blocks(block_format, 3, 768, np.random.default_rng(0))
    assert blocks.dtype == np.uint8
    assert blocks.shape == (3, 768 // layout.num_weights * layout.num_bytes)


@pytest.mark.parametrize("block_format", LAYOUTS)
def test_the_format_s_own_reader_finds_valid_weights(block_format):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'moe-bitnet[peers]'")
    kind = gguf.GGMLQuantizationType[block_format]
    assert gguf.GGML_QUANT_SIZES[kind] == (LAYOUTS[block_format].num_weights, LAYOUTS[block_format].num_bytes)
    weight = gguf.dequantize(random_blocks(block_format, 64, 512, np.random.default_rng(0)), kind)
    assert weight.shape == (64, 512)
    # The mean square of 32768 draws of a bounded variable is within 3 % of its expectation, 1 / columns.
    assert (weight**2).mean() * 512 == pytest.approx(1.0, abs=0.03)
    if block_format.startswith("TQ"):
        assert len(np.unique(weight)) == 3


def test_rows_are_whole_blocks():
    with pytest.raises(ShapeError, match="multiple of 256"):
        random_blocks("TQ2_0", 3, 257, np.random.default_rng(0))
