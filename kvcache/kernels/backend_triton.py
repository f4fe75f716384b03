"""Operations on pages in Triton for NVIDIA GPUs, imported only where they can run.

The kernels are in :mod:`kvcache.kernels.triton`. Importing this module does not import triton; loading the backend
does, and only if there is a GPU.
"""

from moe_bitnet.kernels.backend_triton import DEVICE_TYPES, NAME, why_absent
from moe_bitnet.kernels.registry import Backend


def load_backend() -> Backend:
    """Import the kernels; without triton or a GPU the backend has no operations and says why."""
    reason = why_absent()
    if reason is not None:
        return Backend(NAME, {}, DEVICE_TYPES, absent_because=reason)
    from kvcache.kernels.triton.operations import OPERATIONS

    return Backend(NAME, OPERATIONS, DEVICE_TYPES)
