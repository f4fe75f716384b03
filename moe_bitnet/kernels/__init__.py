"""Ternary operations: one signature each, several backends.

``select("ternary_linear")`` returns the best available function. Signatures and
meaning are those of :mod:`moe_bitnet.kernels.backend_reference`.
"""

from functools import cache

from torch.compiler import is_compiling

from moe_bitnet.kernels import backend_cpp, backend_reference, backend_triton
from moe_bitnet.kernels.registry import Backend, Operation, Registry

__all__ = ["Backend", "Operation", "Registry", "registry", "select"]


@cache
def registry() -> Registry:
    """Return the backends of this process, loaded at the first call."""
    reference = Backend("reference", backend_reference.OPERATIONS, backend_reference.DEVICE_TYPES)
    return Registry([backend_cpp.load_backend(), backend_triton.load_backend(), reference])


def select(operation: str, device_type: str = "cpu", backend: str | None = None) -> Operation:
    """Return the function for ``operation``; see :meth:`Registry.select`.

    While torch compiles, it is the one that puts the operation into the graph as a single node, unless ``backend``
    names another; see :mod:`moe_bitnet.kernels.torch_library`.
    """
    if backend is None and is_compiling():
        from moe_bitnet.kernels.torch_library import TRACEABLE

        if operation in TRACEABLE:
            return TRACEABLE[operation]
    return registry().select(operation, device_type, backend)
