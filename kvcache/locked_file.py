"""A file of one writer or several readers: opened with a lock, written in whole, mapped in parts.

The lock belongs to the open file, so it also keeps a second writer of the same process out, and it ends with the
process, however that ends. Locks of this kind are advisory, and need a POSIX system.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_bitnet.errors import CacheFullError, DataError

CHUNK_BYTES = 8 * 2**20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def open_locked(path: Path, is_read_only: bool) -> int:
    """Open a file and lock it against other writers, until its descriptor is closed.

    A writer makes the file if it is missing, for its owner alone.

    Raises:
        DataError: the file is in use, or cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a file. Give the path of a page file, or one that is free.")
    flags, lock = (os.O_RDONLY, fcntl.LOCK_SH) if is_read_only else (os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
    while True:
        with translated_errors(path):
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                raise DataError(
                    f"{path} is in use: it takes one writer or several readers. Close it there, or give another path."
                ) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # a file that its writer has replaced since it was opened


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset, in large chunks."""
    view = memoryview(data)
    while len(view):
        num_written = os.pwrite(descriptor, view[:CHUNK_BYTES], offset)
        view, offset = view[num_written:], offset + num_written


def flush_folder(path: Path) -> None:
    """Make the name of a new file last."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into ours.

    Raises:
        CacheFullError: there is no room, or the file is as large as it may be.
        DataError: any other error.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise CacheFullError(
                f"{path} cannot grow ({error.strerror}). Drop sequences and compact the file, or free disk space."
            ) from error
        raise DataError(f"{path} cannot be used ({error.strerror}). Check its path, rights and disk.") from error


@contextmanager
def mapped(path: Path, descriptor: int, start: int, end: int) -> Iterator[memoryview]:
    """Map bytes ``start`` to ``end`` of a file for reading.

    Should another program cut the file short within the block, the system ends this process (SIGBUS).

    Raises:
        DataError: the file ends before ``end``.
    """
    size = os.fstat(descriptor).st_size
    if end > size:
        raise DataError(f"{path} has {size} bytes, {end} were there before. Restore it, or delete it.")
    offset = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        mmap.mmap(descriptor, end - offset, access=mmap.ACCESS_READ, offset=offset) as mapping,
        memoryview(mapping) as whole,
        whole[start - offset : end - offset] as view,
    ):
        mapping.madvise(mmap.MADV_WILLNEED)  # large reads in place of one for every few pages that are touched
        yield view
