"""One flat array of token ids, in memory or, if it is long, in a file that only this process sees.

The file is memory-mapped: batches read the pages that they touch, and the kernel may drop them again. It lies where
``TMPDIR`` points (else in ``/tmp``) and has no name any more, so that it goes with the process however that ends. A
temporary folder that is itself kept in memory (tmpfs) saves nothing; set ``TMPDIR`` to one on a disk.
"""

import shutil
import tempfile
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from moe_bitnet.errors import DataError

Tokens = npt.NDArray[np.int32]

MAX_TOKENS_IN_MEMORY = 256 * 1024**2
"""1 GiB of int32; longer arrays are mapped from a file."""

_TOKEN_BYTES = np.dtype(np.int32).itemsize
_HASHED_TOKENS = 4 * 1024**2  # handed to a hash at a time


def fill_tokens(parts: Iterable[Tokens], num_tokens: int, max_in_memory: int = MAX_TOKENS_IN_MEMORY) -> Tokens:
    """Join arrays of token ids into one, holding one of them in memory beside it at a time.

    Args:
        parts: int32 arrays; together ``num_tokens`` long.
        num_tokens: length of the result.
        max_in_memory: tokens up to which the result is an ordinary array; above, it is a read-only memory map.
    Returns:
        ``[num_tokens]``, int32, C-contiguous.
    Raises:
        DataError: the temporary folder has too little room.
    """
    if num_tokens > max_in_memory:
        return _fill_file(parts, num_tokens)
    tokens = np.empty(num_tokens, dtype=np.int32)
    end = 0
    for part in parts:
        tokens[end : end + len(part)] = part
        end += len(part)
    assert end == num_tokens
    return tokens


def token_chunks(tokens: Tokens) -> Iterable[memoryview]:
    """Yield the bytes of an array chunk by chunk, so that a mapped one is never in memory as a whole."""
    return (tokens[start : start + _HASHED_TOKENS].data for start in range(0, len(tokens), _HASHED_TOKENS))


def _fill_file(parts: Iterable[Tokens], num_tokens: int) -> Tokens:
    folder = tempfile.gettempdir()
    needed = num_tokens * _TOKEN_BYTES
    advice = "Set TMPDIR to a folder on a disk with more room, or train on fewer shards."
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{num_tokens} tokens need {needed / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free. {advice}"
        )
    try:
        with tempfile.TemporaryFile(prefix="moe-bitnet-tokens-") as file:
            # Written, not mapped, until it is whole: a disk that fills up is an error here, and a crash in a map.
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype=np.int32).data)
            assert file.tell() == needed
            file.flush()
            return np.memmap(file, dtype=np.int32, mode="r", shape=(num_tokens,))
    except OSError as error:
        raise DataError(f"{num_tokens} tokens cannot be written to {folder} ({error.strerror}). {advice}") from error
