"""glibc's settings under which training keeps freed memory mapped."""

KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Environment of a process. Without it glibc returns large tensors to the kernel, and each new one faults its pages
in again (log-softmax over the vocabulary: 58 ms instead of 4)."""
