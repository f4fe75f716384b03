"""Operations on pages: one signature each, several backends.

``select("paged_attention")`` returns the best available function. Signatures and meaning are those of
:mod:`kvcache.kernels.backend_reference`.
"""

from functools import cache

from kvcache.kernels import backend_cpp, backend_reference, backend_triton
from moe_bitnet.kernels.registry import Backend, Operation, Registry

__all__ = ["registry", "select"]


@cache
def registry() -> Registry:
    """Return the backends of this process, loaded at the first call."""
    reference = Backend("reference", backend_reference.OPERATIONS, backend_reference.DEVICE_TYPES)
    return Registry([backend_cpp.load_backend(), backend_triton.load_backend(), reference])


def select(operation: str, device_type: str = "cpu", backend: str | None = None) -> Operation:
    """Return the function for ``operation``; see :meth:`moe_bitnet.kernels.registry.Registry.select`."""
    return registry().select(operation, device_type, backend)
