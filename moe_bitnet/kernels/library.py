"""Finding and loading a compiled library that was installed with a package.

The library has a plain C interface and is loaded with ctypes; nothing in it
knows torch. In an editable install it lies beside the installed package and not
beside the source, so it is searched along the package's ``__path__``.

``MOE_BITNET_LIBRARY_FOLDER`` names a folder that takes the place of the installed
libraries, such as a build with sanitizers (``cmake -DMOE_BITNET_SANITIZE=ON``).
"""

import ctypes
import importlib
import os
from pathlib import Path

from moe_bitnet.errors import BackendError

FOLDER_VARIABLE = "MOE_BITNET_LIBRARY_FOLDER"


def load_library(package: str, name: str, version: int) -> ctypes.CDLL:
    """Load ``name`` from a package's folders and check its interface version.

    Args:
        package: dotted name of the package that the library was installed into.
        name: file name, such as ``"libternary.so"``.
        version: what the library's ``interface_version()`` must return.
    Raises:
        BackendError: it is not there, cannot be loaded, or is of another version.
    """
    named_folder = os.environ.get(FOLDER_VARIABLE)
    folders = [named_folder] if named_folder else importlib.import_module(package).__path__
    found = next((path for path in (Path(folder, name) for folder in folders) if path.is_file()), None)
    if found is None and named_folder:
        raise BackendError(
            f"{name} is not in {named_folder}, which {FOLDER_VARIABLE} names. Build it there, or unset it."
        )
    if found is None:
        raise BackendError(f"{name} was not built. Install the package with a C++ compiler: pip install -e .")
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        raise BackendError(
            f"{found} cannot be loaded ({error}). Install the package again: pip install -e ."
        ) from error
    library.interface_version.restype = ctypes.c_int32
    if library.interface_version() != version:
        raise BackendError(
            f"{found} has interface version {library.interface_version()}, this code needs {version}. "
            f"Install the package again: pip install -e ."
        )
    return library
