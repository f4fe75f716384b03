"""What the machine gives, through the probes that the library ships: read bandwidth and integer peak.

A share is only worth something if its denominator was measured beside it: give the probes to
:func:`benchmarks.timing.compare` as candidates.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from moe_bitnet.kernels.backend_cpp import load_kernel_library


def read_call(buffer: Tensor) -> Callable[[], object]:
    """Return a function that reads a contiguous tensor once with torch's threads, as the kernels read weights."""
    library = load_kernel_library()
    return lambda: library.ternary_probe_read(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())


def peak_call(num_operations: float) -> Callable[[], object]:
    """Return a function that does at least so many integer operations (two a multiply-add) in registers."""
    library, done = load_kernel_library(), ctypes.c_int64()
    library.ternary_probe_peak(1, ctypes.byref(done), 1)
    threads = torch.get_num_threads()
    iterations = max(1, round(num_operations / (2 * done.value * threads)))
    return lambda: library.ternary_probe_peak(iterations, ctypes.byref(done), torch.get_num_threads())
