import errno
import hashlib
import shutil
import tempfile
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.training import token_array
from cluster.training.token_array import fill_tokens, token_chunks
from moe_bitnet.errors import DataError


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def parts(num_parts=7, length=33):
    return (np.arange(start, start + length, dtype=np.int32) for start in range(0, num_parts * length, length))


@pytest.mark.parametrize("max_in_memory", [230, 231])
def test_parts_are_joined_in_order(scratch, max_in_memory):
    tokens = fill_tokens(parts(), 231, max_in_memory)
    assert isinstance(tokens, np.memmap) == (max_in_memory < 231)
    assert (tokens.dtype, tokens.flags.c_contiguous) == (np.int32, True)
    np.testing.assert_array_equal(tokens, np.arange(231))
    assert not any(scratch.iterdir())


def test_memory_stays_at_a_part(scratch):
    tracemalloc.start()
    tokens = fill_tokens(parts(64, 50_000), 64 * 50_000, max_in_memory=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens[-1] == 64 * 50_000 - 1
    assert peak < 4 * 200_000  # a part is 200 KB, the whole 12.8 MB


def test_too_little_room_is_an_error_before_anything_is_written(scratch, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=923))
    with pytest.raises(DataError, match="Set TMPDIR"):
        fill_tokens(iter(()), 231, max_in_memory=0)


def test_a_disk_that_fills_up_is_an_error(scratch, monkeypatch):
    def fill_up():
        yield from parts(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="No space left on device"):
        fill_tokens(fill_up(), 231, max_in_memory=0)


def test_chunks_are_the_bytes_of_the_array(monkeypatch):
    monkeypatch.setattr(token_array, "_HASHED_TOKENS", 100)
    tokens = np.arange(231, dtype=np.int32)
    digest = hashlib.sha256()
    for chunk in token_chunks(tokens):
        digest.update(chunk)
    assert digest.digest() == hashlib.sha256(tokens.tobytes()).digest()
