"""Every way to compute an operation on pages on the CPU: "cpp" once for each of its instruction sets."""

from kernel_variants import Variant

from kvcache.kernels import registry
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS


def page_variants_with(operation):
    """The variants whose backend has the operation for CPU tensors; the reference is what they are compared with."""
    if operation not in registry().backend("cpp").operations:
        return []
    return [Variant("cpp", each) for each in INSTRUCTION_SETS]
