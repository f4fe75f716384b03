"""The standard library of the running interpreter as text: where its sources are, and what its C modules say.

About 31 MB of sources with its tests, 12 MB where a distribution leaves those
out, and the docstrings of the modules that have no sources to read.
"""

import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.training.document import Document

FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages"})
"""Folders inside the library's own that hold other people's packages."""

# C modules whose import does nothing but define names; those that a platform lacks are left out.
# fmt: off
_C_MODULES = (
    "_bisect", "_bz2", "_codecs", "_collections", "_csv", "_datetime", "_functools", "_hashlib", "_heapq", "_io",
    "_json", "_lzma", "_operator", "_random", "_socket", "_sqlite3", "_statistics", "_struct", "_thread", "array",
    "binascii", "builtins", "cmath", "errno", "fcntl", "gc", "itertools", "math", "mmap", "nt", "posix", "pyexpat",
    "resource", "select", "sys", "termios", "time", "unicodedata", "zlib",
)
# fmt: on


def library_folder() -> Path:
    """Return the folder of the library's sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_library_source(file_name: str) -> bool:
    """Say whether a file of the library is Python source that is the same on every machine."""
    # _sysconfigdata holds the build's compiler flags and folders, which differ from machine to machine.
    return file_name.endswith(".py") and not file_name.startswith("_sysconfigdata")


def describe_c_modules() -> Iterator[Document]:
    """Yield a document of docstrings for each C module that this platform has."""
    for name in _C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield Document(f"docstrings/{name}", describe_module(module))


def describe_module(module: ModuleType) -> str:
    """Return the docstrings of a module written in C: its own, its functions', its classes' and their methods'.

    Values are left out, unlike in ``help()``: they hold paths and addresses of the machine.
    """
    blocks = [f"{module.__name__}\n\n{inspect.getdoc(module) or ''}"]
    for name, value in sorted(vars(module).items()):
        # A second name of the same thing (IOError for OSError) is not described again.
        if name.startswith("_") or getattr(value, "__name__", None) != name:
            continue
        if inspect.isbuiltin(value):
            blocks.append(_describe(f"{module.__name__}.{name}", value))
        elif inspect.isclass(value):
            blocks.append(_describe(f"class {module.__name__}.{name}", value))
            methods = sorted((key, method) for key, method in vars(value).items() if not key.startswith("_"))
            blocks.extend(_describe(f"{name}.{key}", method) for key, method in methods if method.__doc__)
    return "\n\n".join(blocks) + "\n"


def _describe(title: str, value: Any) -> str:
    # C signatures open with $module or $self, which a caller never writes.
    signature = re.sub(r"\$\w+(, )?", "", getattr(value, "__text_signature__", None) or "")
    lines = (inspect.getdoc(value) or "").splitlines()
    return "\n".join([title + signature, *(f"    {line}".rstrip() for line in lines)])
