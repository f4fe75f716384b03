"""The ternary operations as torch sees them: one node of a graph each, for ``torch.compile`` and ``torch.export``.

Importing this file registers ``torch.ops.moe_bitnet.<operation>``, once in a process. A call goes to the backend
that :func:`moe_bitnet.kernels.select` takes for the tensors' device at that moment, so that a compiled graph follows
``MOE_BITNET_BACKEND`` as plain calls do.

A graph knows tensors, numbers and strings, so a matrix is five arguments, the fields of
:class:`moe_bitnet.tiles.TiledTernary` in their order. Weights are tiles and never portable bytes::

    matrix = Tensor tiles, Tensor weight_scale, SymInt out_features, SymInt in_features, str layout

    quantize_activation    (x)                                                          -> (x_q, activation_scale)
    rms_norm_quantize      (x, norm_weight, eps)                                        -> (x_q, activation_scale)
    ternary_linear         (x_q, activation_scale, matrix)                              -> output
    grouped_ternary_linear (x_q, activation_scale, matrix, expert_offsets)              -> output
    expert_ffn             (x_q, activation_scale, gate matrix, up matrix, down matrix,
                            norm_weight, norm_eps, activation, expert_offsets)          -> output

Shapes, dtypes and errors are those of :mod:`moe_bitnet.kernels.backend_reference`; outputs are contiguous. There are
no gradients: a call with a tensor that requires one is an error while gradients are enabled.

The functions below, collected in :data:`TRACEABLE`, have the signatures of the reference and put these nodes into a
graph. ``select`` returns them while torch compiles; otherwise the backend is called directly, which costs less.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

from moe_bitnet.kernels import Operation, registry
from moe_bitnet.kernels.backend_reference import DEVICE_TYPES
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import PackedTernary
from moe_bitnet.tiles import TernaryMatrix, TiledTernary, tile

NAMESPACE = "moe_bitnet"

_MATRIX_SCHEMA = "Tensor {0}tiles, Tensor {0}scale, SymInt {0}out_features, SymInt {0}in_features, str {0}layout"
_MATRIX_LENGTH = 5
_ROWS_SCHEMA = "Tensor x_q, Tensor activation_scale"
SCHEMAS = {
    "quantize_activation": "(Tensor x) -> (Tensor, Tensor)",
    "rms_norm_quantize": "(Tensor x, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
    "ternary_linear": f"({_ROWS_SCHEMA}, {_MATRIX_SCHEMA.format('')}) -> Tensor",
    "grouped_ternary_linear": f"({_ROWS_SCHEMA}, {_MATRIX_SCHEMA.format('')}, Tensor expert_offsets) -> Tensor",
    "expert_ffn": (
        f"({_ROWS_SCHEMA}, {', '.join(_MATRIX_SCHEMA.format(name) for name in ('gate_', 'up_', 'down_'))}, "
        f"Tensor norm_weight, float norm_eps, str activation, Tensor expert_offsets) -> Tensor"
    ),
}
"""Signatures of the operations in torch's notation."""


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Put :func:`moe_bitnet.quantization.quantize_activation` into a graph."""
    x_q, activation_scale = torch.ops.moe_bitnet.quantize_activation(x.detach())
    return x_q, activation_scale


def rms_norm_quantize(x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Put :func:`moe_bitnet.kernels.backend_reference.rms_norm_quantize` into a graph."""
    x_q, activation_scale = torch.ops.moe_bitnet.rms_norm_quantize(x.detach(), norm_weight.detach(), eps)
    return x_q, activation_scale


def ternary_linear(x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix) -> Tensor:
    """Put :func:`moe_bitnet.kernels.backend_reference.ternary_linear` into a graph.

    Portable bytes are tiled in the graph, at each call: lay them out before with ``arrange_weights``.
    """
    output: Tensor = torch.ops.moe_bitnet.ternary_linear(x_q, activation_scale.detach(), *_flat(weight))
    return output


def grouped_ternary_linear(
    x_q: Tensor, activation_scale: Tensor, weight: TernaryMatrix, expert_offsets: Tensor
) -> Tensor:
    """Put :func:`moe_bitnet.kernels.backend_reference.grouped_ternary_linear` into a graph."""
    output: Tensor = torch.ops.moe_bitnet.grouped_ternary_linear(
        x_q, activation_scale.detach(), *_flat(weight), expert_offsets
    )
    return output


def expert_ffn(x_q: Tensor, activation_scale: Tensor, experts: ExpertWeights, expert_offsets: Tensor) -> Tensor:
    """Put :func:`moe_bitnet.kernels.backend_reference.expert_ffn` into a graph."""
    output: Tensor = torch.ops.moe_bitnet.expert_ffn(
        x_q,
        activation_scale.detach(),
        *_flat(experts.gate),
        *_flat(experts.up),
        *_flat(experts.down),
        experts.norm_weight.detach(),
        experts.norm_eps,
        experts.activation,
        expert_offsets,
    )
    return output


TRACEABLE: dict[str, Operation] = {
    "quantize_activation": quantize_activation,
    "rms_norm_quantize": rms_norm_quantize,
    "ternary_linear": ternary_linear,
    "grouped_ternary_linear": grouped_ternary_linear,
    "expert_ffn": expert_ffn,
}
"""By operation: a function with the reference's signature that torch can trace."""


def _flat(weight: TernaryMatrix) -> tuple[Tensor, Tensor, int, int, str]:
    tiled = tile(weight) if isinstance(weight, PackedTernary) else weight
    return tiled.tiles, tiled.weight_scale.detach(), tiled.out_features, tiled.in_features, tiled.layout


def _select(operation: str, x: Tensor) -> Operation:
    # not the package's select: torch may run an operation while it compiles, to fold constants
    return registry().select(operation, x.device.type)


def _compute_quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    x_q, activation_scale = _select("quantize_activation", x)(x)
    return x_q.contiguous(), activation_scale.contiguous()


def _compute_rms_norm_quantize(x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_q, activation_scale = _select("rms_norm_quantize", x)(x, norm_weight, eps)
    return x_q.contiguous(), activation_scale.contiguous()


def _compute_ternary_linear(x_q: Tensor, activation_scale: Tensor, *matrix: Any) -> Any:
    return _select("ternary_linear", x_q)(x_q, activation_scale, TiledTernary(*matrix))


def _compute_grouped_ternary_linear(x_q: Tensor, activation_scale: Tensor, *arguments: Any) -> Any:
    *matrix, expert_offsets = arguments
    return _select("grouped_ternary_linear", x_q)(x_q, activation_scale, TiledTernary(*matrix), expert_offsets)


def _compute_expert_ffn(x_q: Tensor, activation_scale: Tensor, *arguments: Any) -> Any:
    *matrices, norm_weight, norm_eps, activation, expert_offsets = arguments
    gate, up, down = (TiledTernary(*matrices[i : i + _MATRIX_LENGTH]) for i in range(0, len(matrices), _MATRIX_LENGTH))
    experts = ExpertWeights(gate, up, down, norm_weight, norm_eps, activation)
    return _select("expert_ffn", x_q)(x_q, activation_scale, experts, expert_offsets)


def _shape_of_quantized(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _shape_of_linear(x_q: Tensor, activation_scale: Tensor, tiles: Tensor, scale: Tensor, *sizes: Any) -> Tensor:
    return x_q.new_empty((x_q.shape[0], sizes[0]), dtype=torch.float32)


def _shape_of_expert_ffn(x_q: Tensor, activation_scale: Tensor, *arguments: Any) -> Tensor:
    down = arguments[2 * _MATRIX_LENGTH : 3 * _MATRIX_LENGTH]
    return _shape_of_linear(x_q, activation_scale, *down)


_COMPUTE: dict[str, Operation] = {
    "quantize_activation": _compute_quantize_activation,
    "rms_norm_quantize": _compute_rms_norm_quantize,
    "ternary_linear": _compute_ternary_linear,
    "grouped_ternary_linear": _compute_grouped_ternary_linear,
    "expert_ffn": _compute_expert_ffn,
}
_SHAPE_OF: dict[str, Operation] = {
    "quantize_activation": _shape_of_quantized,
    "rms_norm_quantize": _shape_of_quantized,
    "ternary_linear": _shape_of_linear,
    "grouped_ternary_linear": _shape_of_linear,
    "expert_ffn": _shape_of_expert_ffn,
}


def _refuse_gradients(name: str, function: Operation) -> Operation:
    @functools.wraps(function)
    def checked(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
            raise RuntimeError(
                f"{name}: an argument requires a gradient, and this operation of inference has none. Call it under "
                f"torch.no_grad() or pass tensors that are detached; train with BitLinear and BitExperts."
            )
        return function(*arguments)

    return checked


def _register() -> Any:
    library: Any = Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        compute = _refuse_gradients(name, _COMPUTE[name])
        for device_type in DEVICE_TYPES:
            library.impl(name, compute, device_type.upper())
        # without it, torch's own kernel would let outputs require gradients that are not there
        library.impl(name, fallthrough_kernel, "Autograd")
        register_fake(f"{NAMESPACE}::{name}", _refuse_gradients(name, _SHAPE_OF[name]), lib=library)
    return library


# The operations live as long as this object; a module that is imported again finds those of the first time.
if not hasattr(torch.ops.moe_bitnet, "expert_ffn"):
    _LIBRARY = _register()
