"""Operations in Triton for NVIDIA GPUs, imported only where they can run.

The kernels are in :mod:`moe_bitnet.kernels.triton`. Importing this module does not import triton; loading the
backend does, and only if there is a GPU.
"""

import importlib.util

import torch

from moe_bitnet.kernels.registry import Backend

NAME = "triton"
DEVICE_TYPES = ("cuda",)
_OLDEST_CAPABILITY = (8, 0)


def load_backend() -> Backend:
    """Import the kernels; without triton or a GPU the backend has no operations and says why."""
    reason = why_absent()
    if reason is not None:
        return Backend(NAME, {}, DEVICE_TYPES, absent_because=reason)
    from moe_bitnet.kernels.triton.operations import OPERATIONS

    return Backend(NAME, OPERATIONS, DEVICE_TYPES)


def why_absent() -> str | None:
    """Return why no kernel of Triton can run here, or ``None`` if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        return "Triton needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None
