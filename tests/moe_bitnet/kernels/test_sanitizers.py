"""The C++ kernels read and write no byte that is not theirs, and rely on nothing that C++ leaves undefined.

The library is built once more with the address and undefined-behaviour sanitizers, and a part of the kernel tests runs
with it in a process of its own. (Kernels prefetch beyond their buffers on purpose; a prefetch is no access.)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_variants import run_python

pytestmark = pytest.mark.slow  # the build alone takes minutes

ROOT = Path(__file__).parents[3]
BUILD_TIMEOUT_S, TEST_TIMEOUT_S = 1200, 1200

HERE = Path(__file__).parent
TESTS = [
    ROOT / "tests/kvcache/kernels/test_cpp_attention.py",
    ROOT / "tests/kvcache/kernels/test_cpp_encode.py",
    HERE / "test_expert_ffn.py",
    HERE / "test_instruction_sets.py",
    HERE / "test_quantize_activation.py",
    HERE / "test_rms_norm_quantize.py",
    HERE / "test_ternary_linear.py",
    HERE / "test_threads.py",
    HERE / "test_tile.py",
    HERE.parent / "test_decoder.py",
    HERE.parent / "test_packed_module.py",
]
# Neither what tests the reference, nor what starts a process of its own, nor all of what takes long.
LEFT_OUT = [
    "reference",
    "portable",
    "process",
    "forked",
    "would_not_use",
    "any_shape",
    "any_floats",
    "(extreme_sums and 131071)",
]


def output_of(*command, timeout=60):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout.strip()


def build(cmake, folder):
    """Build the sanitized library; returns the compiler that CMake took."""
    ninja = shutil.which("ninja", path=search_path())
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    output_of(cmake, "-S", str(ROOT), "-B", str(folder), "-DMOE_BITNET_SANITIZE=ON", *generator)
    cache = (folder / "CMakeCache.txt").read_text().splitlines()
    compiler = next(line.split("=", 1)[1] for line in cache if line.startswith("CMAKE_CXX_COMPILER:"))
    if "Free Software Foundation" not in output_of(compiler, "--version"):
        pytest.skip(f"{compiler} is not GCC; where another compiler keeps its sanitizers is not known here")
    if not Path(runtime(compiler, "libasan.so")).is_absolute():
        pytest.skip(f"{compiler} has no libasan")
    output_of(cmake, "--build", str(folder), "--target", "ternary", timeout=BUILD_TIMEOUT_S)
    return compiler


def search_path():
    """The folders of ``PATH`` and that of this Python, where pip installs cmake and ninja."""
    return os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))


def runtime(compiler, name):
    """The path of a compiler's runtime library, or just its name if there is none."""
    return output_of(compiler, f"-print-file-name={name}")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The environment of a process that takes the sanitized library for the installed one."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizers' runtime is put before Python's own libraries with LD_PRELOAD, on Linux alone")
    cmake = shutil.which("cmake", path=search_path())
    if cmake is None:
        pytest.skip("cmake is not installed")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++")):
        pytest.skip("no C++ compiler is installed")
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = build(cmake, folder)
    return {
        "MOE_BITNET_LIBRARY_FOLDER": str(folder),
        # Python loads no C++ itself; the runtime looks for the real __cxa_throw when it starts
        "LD_PRELOAD": f"{runtime(compiler, 'libasan.so')} {runtime(compiler, 'libstdc++.so')}",
        # the interpreter keeps memory until it ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "MOE_BITNET_ISA": "",
    }


OVERRUN = """
import ctypes, sys
import torch
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS, load_kernel_library
from moe_bitnet.kernels.structures import matrices_structure
from moe_bitnet.tiles import TiledTernary
library = load_kernel_library()
if library.ternary_select_isa(INSTRUCTION_SETS.index(sys.argv[1])) < 0:
    sys.exit(77)
lines = {lines}  # a row block of 36 inputs takes 9
tiles, weight_scale = torch.zeros(1, 64 * 9, dtype=torch.uint8), torch.ones(1, 1)
weight = matrices_structure(TiledTernary(tiles, weight_scale, 64, 36, "2bit"))
short = torch.zeros(64 * lines, dtype=torch.uint8)
weight.tiles = short.data_ptr()
x_q, scale, output = torch.ones(3, 36, dtype=torch.int8), torch.ones(3), torch.empty(3, 64)
offsets = torch.tensor([0, 3])
arguments = [x_q.data_ptr(), scale.data_ptr(), ctypes.byref(weight), offsets.data_ptr(), output.data_ptr(), 1]
library.ternary_grouped_linear(*arguments)
print("returned")
"""


@pytest.mark.parametrize("instruction_set", ["scalar", "avx2", "avx512"])
def test_tiles_that_are_one_line_short_are_reported(sanitized, instruction_set):
    # otherwise the next test could not fail
    script = OVERRUN.replace("sys.argv[1]", repr(instruction_set))
    process = run_python(script.replace("{lines}", "8"), **sanitized)
    if process.returncode == 77:
        pytest.skip(f"instruction set {instruction_set!r} is not supported by this machine.")
    assert process.returncode != 0
    assert "heap-buffer-overflow" in process.stderr
    assert "kernels_" in process.stderr, "the report names the place"
    whole = run_python(script.replace("{lines}", "9"), **sanitized)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, "returned\n", "")


def test_kernels_pass_their_tests_under_the_sanitizers(sanitized):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:faulthandler"]  # its traceback hides the report
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", f"not ({' or '.join(LEFT_OUT)})", *map(str, TESTS)],
        cwd=ROOT,
        env=os.environ | sanitized,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TEST_TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-12_000:]
    assert "runtime error" not in process.stdout, process.stdout[-12_000:]
