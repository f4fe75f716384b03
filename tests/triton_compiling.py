"""Triton's compiler without a GPU: kernels ahead of time, and launches up to the moment they would run.

Importing this skips a test module where triton cannot compile: without it, or in a process that interprets.
"""

import importlib.util
import os
import re
import subprocess
import tempfile

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: this process interprets and cannot compile", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction, driver

ARCHITECTURES = (80, 90, 100)
INT8_PRODUCT = re.compile(
    r"mma\.sync\.\S*\.s32\.s8\.s8\.s32|wgmma\.mma_async\.\S*\.s32\.s8\.s8|tcgen05\.mma\.\S*kind::i8"
)


def compile_ahead(kernel, architecture, constants, types, num_warps=4, num_stages=3, multiples_of_16=()):
    """Compile as a launch with aligned tensors would.

    Args:
        kernel: a jitted function.
        architecture: such as 90.
        constants: values of constexpr arguments by name.
        types: those of the other arguments; integers of 32 bits where none is given.
        num_warps: of a program.
        num_stages: of loops.
        multiples_of_16: integers of which the launch would find that out.
    """
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if kinds[name].startswith("*") or name in multiples_of_16]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def assert_sound(compiled, product=INT8_PRODUCT, num_products=0, max_stack_bytes=0):
    """No spills, or few; at least ``num_products`` tensor-core instructions of a kind."""
    ptx = compiled.asm["ptx"]
    assert "st.global" in ptx, "a kernel that stores nothing was compiled away"
    assert len(product.findall(ptx)) >= num_products
    assert stack_bytes(compiled.asm["cubin"]) <= max_stack_bytes, "registers spill to memory"


def stack_bytes(cubin):
    """Bytes of stack of a thread, which is where registers spill to; the assembler notes them in the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


class DriverWithoutGpu:
    """As much of a driver as compiling for a launch asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Let launches compile for Hopper, with the arguments they are given, and stop there; lists the kernels."""
    kernels, run = [], JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        assert compiled.asm["cubin"]
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", DriverWithoutGpu())
    yield kernels
    for kernel in kernels:
        kernel.device_caches.clear()  # what was compiled for a device that is not there
