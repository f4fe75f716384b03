"""Operations in C++ for CPU tensors; signatures and meaning are those of :mod:`kvcache.kernels.backend_reference`.

They live in the library of :mod:`moe_bitnet.kernels`, so that one pool of threads serves both.
"""

from kvcache.kernels import cpp_attention, cpp_encode
from moe_bitnet.errors import BackendError
from moe_bitnet.kernels.backend_cpp import load_kernel_library
from moe_bitnet.kernels.registry import Backend, Operation

NAME = "cpp"
DEVICE_TYPES = ("cpu",)


def load_backend() -> Backend:
    """Load the library; an absent one gives a backend without operations that says why."""
    try:
        library = load_kernel_library()
    except BackendError as error:
        return Backend(NAME, {}, DEVICE_TYPES, absent_because=str(error))
    operations: dict[str, Operation] = {
        "encode_page": cpp_encode.Encoder(library).encode_page,
        "paged_attention": cpp_attention.Attention(library).paged_attention,
    }
    return Backend(NAME, operations, DEVICE_TYPES)
