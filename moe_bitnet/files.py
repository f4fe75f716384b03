"""Writing files so that an interruption leaves either the old state or the new one.

A single file is written beside its target and renamed over it. A directory is
filled beside its target and swapped in; the one moment in which neither name
holds a whole directory is repaired by :func:`recover_directory`.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_NEW = ".new-"
_OLD = ".old-"


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_NEW}{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON, whole or not at all."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``path`` if the block succeeds.

    An exception (Ctrl-C and a full disk included) leaves ``path`` as it was.
    """
    recover_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}{_NEW}{os.getpid()}")
    old = path.with_name(f".{path.name}{_OLD}{os.getpid()}")
    new.mkdir()
    try:
        yield new
        for file in new.rglob("*"):
            _flush_to_disk(file)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        recover_directory(path)


def recover_directory(path: Path) -> None:
    """Clean up after a :func:`replace_directory` that was killed.

    What a living process is about to swap in or out is left alone. Otherwise a
    predecessor that was set aside comes back if ``path`` is missing, and what
    is left over is deleted.
    """
    for old in _left_behind(path, _OLD):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for new in _left_behind(path, _NEW):
        shutil.rmtree(new, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _left_behind(path: Path, marker: str) -> list[Path]:
    """Return the folders beside ``path`` that this process or a dead one made for it."""
    found = []
    for folder in sorted(path.parent.glob(f".{glob.escape(path.name)}{marker}*")):
        owner = folder.name.removeprefix(f".{path.name}{marker}")
        if owner.isdecimal() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            found.append(folder)
    return found


def _flush_to_disk(path: Path) -> None:
    if not path.is_file():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
