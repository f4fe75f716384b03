"""Every Triton kernel compiles for real GPUs, ahead of time and without one: Ampere, Hopper and Blackwell.

The tiles are those of ``plan.py``. A product must run on int8 tensor cores, and nothing may spill registers to memory.
"""

import pytest
import torch
from kernel_variants import offsets_of, random_experts, random_packed, random_rows
from triton_compiling import ARCHITECTURES, assert_sound, compile_ahead, launched

from moe_bitnet.kernels.triton import expert_ffn, launches, linear, operations, quantize, repack, unpack
from moe_bitnet.kernels.triton.plan import MAX_BASE3_TOKENS, PAIR_TILES, SINGLE_TILES
from moe_bitnet.packing import LAYOUTS

__all__ = ["launched"]  # a fixture

POINTERS = {
    "*i8": ("x", "x_q"),
    "*u8": ("tiles", "gate_tiles", "up_tiles", "base3_tiles", "two_bit_tiles"),
    "*i32": ("row_sums", "partial"),
    "*i64": ("expert_offsets",),
    "*fp32": ("activation_scale", "weight_scale", "gate_scale", "up_scale", "output", "inner", "norm_weight"),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names} | {"eps": "fp32"}
MULTIPLES_OF_16 = ("in_features", "out_features", "num_features", "block_bytes", "base3_bytes", "two_bit_bytes")


def compile_kernel(kernel, architecture, constants, num_warps=4, num_stages=3, **types):
    """Compile as a launch with sizes that are multiples of 16 would."""
    kinds = {**TYPES, **types}
    return compile_ahead(kernel, architecture, constants, kinds, num_warps, num_stages, MULTIPLES_OF_16)


def family(architecture):
    """The key of the tables of tiles."""
    return architecture // 10


def product_cases():
    """Every tile of every table, in the layouts that it meets; one of each kind is fast, the others are marked slow."""
    for is_pair, table in ((False, SINGLE_TILES), (True, PAIR_TILES)):
        for architecture in ARCHITECTURES:
            tiles = table[family(architecture)]
            for tile in tiles:
                is_small = tile.block_tokens <= MAX_BASE3_TOKENS
                for layout in LAYOUTS if is_small else ("2bit",):
                    # few rows are split, many are not
                    is_fast = tile is tiles[-1] or (tile.block_tokens == 16 and is_pair == (layout == "base3"))
                    splits = (tile is not tiles[-1],) if is_fast else ()
                    for is_split in (True, False):
                        yield pytest.param(
                            architecture, is_pair, layout, tile, is_split,
                            id=f"sm_{architecture}-{'pair' if is_pair else 'single'}-{layout}-{tile.block_tokens}"
                            f"-{'split' if is_split else 'whole'}",
                            marks=() if is_split in splits else pytest.mark.slow,
                        )  # fmt: skip


@pytest.mark.parametrize(("architecture", "is_pair", "layout", "tile", "is_split"), list(product_cases()))
def test_products_use_int8_tensor_cores_and_do_not_spill(architecture, is_pair, layout, tile, is_split):
    constants = {
        "IS_BASE3": layout == "base3",
        "IS_SPLIT": is_split,
        "SUMS_ROWS": tile.sums_rows,
        "ROW_BLOCKS": tile.row_blocks,
        "BLOCK_TOKENS": tile.block_tokens,
        "MAX_EXPERTS": 8,
        "USE_PTX": True,
    }
    if is_pair:
        kernel, constants = expert_ffn.gate_up_kernel, {**constants, "IS_SQUARED_RELU": False}
    else:
        kernel, constants = linear.linear_kernel, {**constants, "IS_GROUPED": True}
    compiled = compile_kernel(kernel, architecture, constants, tile.num_warps, tile.num_stages)
    # four fields of four steps of 32 inputs each
    assert_sound(compiled, num_products=16 * (1 + is_pair))
    if architecture == 90 and tile.row_blocks == 4:
        assert "wgmma.mma_async" in compiled.asm["ptx"], "Hopper's own instruction takes 64 weight rows"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_product_without_experts_compiles(architecture):
    constants = {
        "IS_BASE3": False, "IS_GROUPED": False, "IS_SPLIT": False, "SUMS_ROWS": True, "ROW_BLOCKS": 1,
        "BLOCK_TOKENS": 8, "MAX_EXPERTS": 2, "USE_PTX": True,
    }  # fmt: skip
    assert_sound(compile_kernel(linear.linear_kernel, architecture, constants, 1, 4), num_products=16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_quantizers_compile_without_spills(architecture, kind, has_norm):
    constants = {
        "HAS_NORM": has_norm, "IS_GROUPED": has_norm and kind == "fp32", "SUMS_ROWS": has_norm, "MAX_EXPERTS": 8,
        "BLOCK": 2048,
    }  # fmt: skip
    assert_sound(compile_kernel(quantize.quantize_kernel, architecture, constants, 8, x=f"*{kind}"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_kernels_compile_without_spills(architecture):
    experts = {"MAX_EXPERTS": 64, "BLOCK_FEATURES": 1024}
    for kernel, constants in (
        (linear.rescale_kernel, {**experts, "IS_GROUPED": True}),
        (linear.rescale_kernel, {**experts, "IS_GROUPED": False}),
        (expert_ffn.activate_kernel, {**experts, "IS_SQUARED_RELU": False}),
        (expert_ffn.activate_kernel, {**experts, "IS_SQUARED_RELU": True}),
        (quantize.row_sums_kernel, {"BLOCK": 2048}),
        (repack.repack_kernel, {"GROUPS": repack.GROUPS_PER_PROGRAM, "USE_PTX": True}),
    ):
        assert_sound(compile_kernel(kernel, architecture, constants))


@pytest.fixture(autouse=True)
def _ptx(monkeypatch):
    """Launches take the kernels for GPUs, although their tensors are on the CPU."""
    monkeypatch.setattr(launches, "_uses_ptx", lambda rows: True)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 64, 96), (40, 4096, 33)], ids=str)
def test_launches_compile_as_they_are_made(launched, sizes):
    # Triton turns sizes of 1 into constants and types the others by value, which only a launch shows
    num_rows, hidden_size, inner_size = sizes
    x_q, scale = random_rows(num_rows, hidden_size)
    for layout in LAYOUTS:
        experts = random_experts(2, inner_size, hidden_size, layout)
        operations.expert_ffn(x_q, scale, experts, offsets_of([num_rows, 0]))
        operations.ternary_linear(x_q, scale, random_packed(inner_size, hidden_size, layout=layout))
    operations.quantize_activation(torch.ones(num_rows, hidden_size, dtype=torch.bfloat16))
    operations.rms_norm_quantize(torch.ones(num_rows, hidden_size), torch.ones(hidden_size), 1e-5)
    wanted = {"gate_up_kernel", "linear_kernel", "quantize_kernel"}
    if num_rows > 32:
        wanted |= {"row_sums_kernel", "repack_kernel"}
    if hidden_size >= 4096:
        wanted |= {"rescale_kernel", "activate_kernel"}
    assert {kernel.__name__ for kernel in launched} == wanted


def run_ptx(text, word):
    """Run straight-line PTX of three instructions on a 32-bit word ``$5``; returns ``$0 … $4``."""
    registers = {"$5": word}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    def permute(low, high, selector):
        source = (low | high << 32).to_bytes(8, "little")
        nibbles = [selector >> 4 * place & 0xF for place in range(4)]
        assert max(nibbles) < 8, "the sign mode of prmt is not used"
        return int.from_bytes(bytes(source[nibble] for nibble in nibbles), "little")

    compute = {
        "and.b32": lambda x, y: x & y,
        "mad.lo.u32": lambda x, y, z: (x * y + z) & 0xFFFFFFFF,
        "prmt.b32": permute,
    }
    for line in text.split(";"):
        name, _, operands = line.strip(" {}\n").partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = compute[name](*map(value, sources))
    return [registers[f"${index}"] for index in range(5)]


def test_the_ptx_gives_the_digits_of_every_byte_beside_any_neighbours():
    digits = {byte: [byte // 3**place % 3 for place in range(5)] for byte in range(243)}
    for byte in digits:
        for neighbour in (0, 242, 242 - byte, 80, 161):
            for place in range(4):
                lanes = [neighbour] * 4
                lanes[place] = byte
                results = run_ptx(unpack.BASE3_PTX.value, int.from_bytes(bytes(lanes), "little"))
                for index, result in enumerate(results):
                    assert list(result.to_bytes(4, "little")) == [digits[lane][index] for lane in lanes]
