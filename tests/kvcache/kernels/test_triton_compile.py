"""Every kernel on pages compiles for real GPUs, ahead of time and without one: Ampere, Hopper and Blackwell.

The tiles are those of ``plan.py``. Products of codes must run on int8 tensor cores, and nothing may spill registers to
memory up to 128 channels, but for a few on some versions of Triton.
"""

import re

import pytest
import torch
from page_factories import exact_page, layer_format, plain_layer_frame, random_tokens
from triton_compiling import ARCHITECTURES, INT8_PRODUCT, assert_sound, compile_ahead, launched

from kvcache.kernels.batch import PagedBatch
from kvcache.kernels.triton import exact, frame_map, layout, merge, operations, packed, queries, trials, writer
from kvcache.kernels.triton.plan import TILES
from kvcache.page import PAGE_SIZE

__all__ = ["launched"]  # a fixture

HALF_PRODUCT = re.compile(
    r"mma\.sync\.\S*\.f32\.f16\.f16\.f32|wgmma\.mma_async\.\S*\.f32\.f16\.f16|tcgen05\.mma\.\S*kind::f16"
)
TF32_PRODUCT = re.compile(r"mma\.sync\.\S*\.tf32\.tf32")
POINTERS = {
    "*fp16": ("query_high", "query_low", "exact", "packed_halves"),
    "*fp32": (
        "query", "key", "value", "output", "query_unit", "digit_units", "query_offset", "maxima", "weight_sums",
        "value_sums", "decode_matrix", "encode_matrix", "mean", "scale_table", "covered_table", "y", "trial_scales",
        "segment_weights", "errors", "chosen_scales",
    ),
    "*i8": ("digits", "level_table"),
    "*u8": ("packed_bytes", "page_is_packed", "survivors"),
    "*i32": ("packed_words", "page_ids", "page_num_tokens", "scale_steps", "trial_codes", "planes"),
    "*i64": ("row_offsets", "page_offsets"),
}  # fmt: skip
TYPES = {name: kind for kind, names in POINTERS.items() for name in names} | {"scale": "fp32"}


def compile_kernel(kernel, architecture, constants, num_warps=4, num_stages=3, **types):
    """Compile ahead of time; constants that the kernel does not take are left out."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return compile_ahead(kernel, architecture, constants, {**TYPES, **types}, num_warps, num_stages)


def constants_of(layer, tile):
    constants = layout.page_constants(layer)
    return constants | {"NUM_HEADS": 8, "GROUP": 4, "BLOCK_ROWS": tile.block_rows, "MAX_SEQUENCES": 8}


def tile_cases(fast_tiles):
    """Every tile of every architecture; those whose index is among ``fast_tiles`` are fast."""
    for architecture in ARCHITECTURES:
        tiles = TILES[architecture // 10]
        for index, tile in enumerate(tiles):
            is_fast = index in {place % len(tiles) for place in fast_tiles}
            name = f"sm_{architecture}-{tile.block_rows}"
            yield pytest.param(architecture, tile, id=name, marks=() if is_fast else pytest.mark.slow)


def check_packed(architecture, tile, widths, head_dim, num_products):
    layer = layer_format(2, head_dim, *widths, is_calibrated=True)
    compiled = compile_kernel(packed.packed_kernel, architecture, constants_of(layer, tile), tile.num_warps)
    # Triton 3.7 spills 48 bytes for 32 rows on sm_80, less than a page's lookups for a second tile cost; 3.9 none
    assert_sound(compiled, INT8_PRODUCT, num_products, max_stack_bytes=64)


@pytest.mark.parametrize(("architecture", "tile"), list(tile_cases([-1])))
def test_packed_pages_of_4_bits_use_int8_tensor_cores(architecture, tile):
    # three segments of keys, one of them twice; values
    check_packed(architecture, tile, (4, 4), 128, 5)


@pytest.mark.parametrize(("architecture", "tile"), list(tile_cases([0])))
def test_packed_pages_of_8_bits_use_int8_tensor_cores(architecture, tile):
    check_packed(architecture, tile, (8, 8), 128, 4)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("widths", [(8, 4), (4, 2), (2, 2), (4, 16)], ids=str)
@pytest.mark.parametrize(("architecture", "tile"), list(tile_cases([0, 1, 2])))
def test_every_width_uses_int8_tensor_cores(architecture, tile, widths, head_dim):
    check_packed(architecture, tile, widths, head_dim, 1)


@pytest.mark.parametrize(("architecture", "tile"), list(tile_cases([-1])))
def test_float16_pages_and_new_tokens_use_tensor_cores(architecture, tile):
    constants = constants_of(layer_format(2, 128, 4, 4), tile)
    # two parts each of queries and weights, for pages and for new tokens
    compiled = compile_kernel(exact.exact_kernel, architecture, constants, tile.num_warps, num_stages=2)
    assert_sound(compiled, HALF_PRODUCT, 8)


@pytest.mark.parametrize("architecture", [80, *(pytest.param(other, marks=pytest.mark.slow) for other in (90, 100))])
def test_queries_and_outputs_are_mapped_on_tensor_cores(architecture):
    constants = constants_of(layer_format(2, 128, 4, 4, is_calibrated=True), TILES[8][0])
    for block_rows in (16, 32) if architecture > 80 else (32,):
        constants |= {"BLOCK_ROWS": block_rows, "IS_MAPPED": True}
        assert_sound(compile_kernel(queries.query_kernel, architecture, constants), TF32_PRODUCT, 3)
        assert_sound(compile_kernel(merge.merge_kernel, architecture, constants), TF32_PRODUCT, 3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_heads_compile(architecture):
    # may spill: 256 channels are more than the registers of eight warps hold on every architecture
    tile = next(tile for tile in TILES[8] if tile.block_rows == 16)
    constants = constants_of(layer_format(2, 256, 4, 4, is_calibrated=True), tile)
    for kernel in (packed.packed_kernel, exact.exact_kernel):
        assert compile_kernel(kernel, architecture, constants, 8, num_stages=1).asm["cubin"]


def encoder_kernels(num_bits):
    layer = layer_format(2, 128, num_bits, num_bits, is_calibrated=True)
    segments = tuple(tuple(segment) for segment in layout.key_segments(layer.key))
    values = ((PAGE_SIZE, num_bits, PAGE_SIZE, 0, 0, 0),)
    sizes = {"HEAD_DIM": 128, "PADDED": 128, "BITS": num_bits, "KEY_SEGMENTS": segments, "NUM_TRIALS": 6}
    keys = {"NUM_ROWS": 64, "NUM_ELEMENTS": 128, "WORDS_PER_LANE": 4 * num_bits, "SEGMENTS": segments, "IS_KEY": True}
    channels = {"NUM_ROWS": 128, "NUM_ELEMENTS": 64, "WORDS_PER_LANE": 2 * num_bits, "SEGMENTS": values}
    return [
        (trials.key_trial_kernel, sizes),
        (trials.value_trial_kernel, sizes),
        (writer.write_kernel, keys),
        (writer.write_kernel, {**channels, "IS_KEY": False}),
    ]


@pytest.mark.parametrize("num_bits", [4, 2])
@pytest.mark.parametrize("architecture", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))])
def test_the_encoder_keeps_states_in_registers_and_rounds_every_product(architecture, num_bits):
    for kernel, constants in encoder_kernels(num_bits):
        compiled = compile_kernel(kernel, architecture, constants, num_warps=1)
        assert_sound(compiled)
        assert "fma.rn.f32" not in compiled.asm["ptx"], "a fused product would choose other codes"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("is_key", "is_plain"), [(True, False), (False, True)])
def test_small_kernels_of_the_encoder_compile(architecture, is_key, is_plain):
    num_trials = 1 if is_plain else 6
    constants = {"HEAD_DIM": 128, "PADDED": 128, "NUM_TRIALS": num_trials, "IS_KEY": is_key, "IS_PLAIN": is_plain}
    assert_sound(compile_kernel(frame_map.map_kernel, architecture, constants))
    constants = {"NUM_TRIALS": num_trials, "NUM_ERRORS": 1 if is_key else 128}
    assert_sound(compile_kernel(trials.choose_kernel, architecture, constants, num_warps=2, planes="*u8"))


@pytest.mark.parametrize(("widths", "group", "num_new"), [((4, 4), 1, 1), ((16, 8), 3, 40)], ids=str)
def test_launches_compile_as_they_are_made(launched, widths, group, num_new):
    # Triton turns sizes of 1 into constants and types the others by value, which only a launch shows
    layer = layer_format(1, 64, *widths)
    frame = plain_layer_frame(layer)
    key, value = random_tokens(layer, PAGE_SIZE)
    page, packed_page = exact_page(layer, key, value), torch.zeros(layer.layer_bytes, dtype=torch.uint8)
    operations.encode_page(layer, frame, page, packed_page)
    batch = PagedBatch(
        packed=packed_page[None], exact=page[None], packed_layer_offset=0, exact_layer_offset=0,
        row_offsets=torch.tensor([0, num_new]), page_offsets=torch.tensor([0, 2]),
        page_ids=torch.zeros(2, dtype=torch.int32), page_is_packed=torch.tensor([0, 1], dtype=torch.uint8),
        page_num_tokens=torch.tensor([64, 64], dtype=torch.int32), scale=0.125,
    )  # fmt: skip
    query = torch.randn(num_new, group, 64)
    operations.paged_attention(layer, frame, query, key[:num_new], value[:num_new], batch)
    wanted = {"map_kernel", "choose_kernel", "write_kernel", "query_kernel", "packed_kernel", "exact_kernel"}
    wanted |= {"merge_kernel"} | ({"key_trial_kernel", "value_trial_kernel"} if widths == (4, 4) else set())
    assert {kernel.__name__ for kernel in launched} == wanted
