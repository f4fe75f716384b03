"""Keep freed memory mapped while a benchmark runs.

With glibc's defaults a result of more than a few hundred KB is unmapped when it is freed and faulted in again by the
next call, a page every 4 KB: in a virtual machine that can take as long as the product itself, for us and for
torch alike. A model's intermediate results live in memory that is reused, so benchmarks measure that.
"""

import os
import sys

from cluster.training.allocator import KEEP_FREED_MEMORY


def keep_freed_memory(module: str) -> None:
    """Start this benchmark again with glibc told to keep what is freed, unless it was.

    Args:
        module: dotted name of the benchmark, for ``python -m``.
    """
    if any(os.environ.get(name) != value for name, value in KEEP_FREED_MEMORY.items()):
        os.environ.update(KEEP_FREED_MEMORY)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
