"""Keep freed memory mapped while a benchmark runs.

With glibc's defaults a result of more than a few hundred KB is unmapped when it is freed and faulted in again by the
next call, a page every 4 KB: in a virtual machine that can take as long as the product itself, for us and for
torch alike. A model's intermediate results live in memory that is reused, so benchmarks measure that.
"""

import os
import sys

_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def keep_freed_memory(module: str) -> None:
    """Start this benchmark again with glibc told to keep what is freed, unless it was.

    Args:
        module: dotted name of the benchmark, for ``python -m``.
    """
    if any(os.environ.get(name) != value for name, value in _SETTINGS.items()):
        os.environ.update(_SETTINGS)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
