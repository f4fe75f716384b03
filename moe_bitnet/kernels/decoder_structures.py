"""The structures of the fused decoder's C interface (``csrc/ternary_decoder.h``).

They hold bare pointers: whoever fills them keeps the tensors alive while the decoder is used.
"""

import ctypes

from moe_bitnet.kernels.structures import ExpertsStructure, MatricesStructure


class TableStructure(ctypes.Structure):
    """``ternary_table``: a float or int8 matrix, row-major."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
    )


class LayerStructure(ctypes.Structure):
    """``ternary_layer``: one block; norms that the recipe does not have are null."""

    _fields_ = (
        ("query", MatricesStructure),
        ("key", MatricesStructure),
        ("value", MatricesStructure),
        ("output", MatricesStructure),
        ("norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("value_norm", ctypes.c_void_p),
        ("output_norm", ctypes.c_void_p),
        ("moe_norm", ctypes.c_void_p),
        ("router", ctypes.c_void_p),
        ("experts", ExpertsStructure),
        ("shared_experts", ExpertsStructure),
    )


class ModelStructure(ctypes.Structure):
    """``ternary_model``."""

    _fields_ = (
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("num_shared_experts", ctypes.c_int64),
        ("norm_eps", ctypes.c_double),
        ("layers", ctypes.POINTER(LayerStructure)),
        ("embedding", TableStructure),
        ("head", TableStructure),
        ("final_norm", ctypes.c_void_p),
    )


class CacheStructure(ctypes.Structure):
    """``ternary_cache``: keys, values and rotary tables of one sequence."""

    _fields_ = (
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("max_tokens", ctypes.c_int64),
    )


DECODER_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ternary_decoder_create": (
        ctypes.c_void_p,
        (ctypes.POINTER(ModelStructure), ctypes.POINTER(CacheStructure), ctypes.c_int64, ctypes.c_int32),
    ),
    "ternary_decoder_destroy": (None, (ctypes.c_void_p,)),
    "ternary_decoder_append": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ),
    "ternary_decoder_moe_layer": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)),
    "ternary_decoder_profile": (None, (ctypes.c_void_p, ctypes.c_void_p)),
}
