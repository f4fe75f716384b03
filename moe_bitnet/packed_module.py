"""Modules that hold packed ternary weights: portable bytes in a checkpoint, tiles while they compute.

::

    state_dict (portable bytes) ──load──► <name>_packed ──arrange_weights──► <name>_tiles ──► kernels
                                ◄──save──        (untiled on the way out)

A module holds one of the two, never both, so memory is that of the weights once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_bitnet.kernels import select
from moe_bitnet.packing import Layout, PackedTernary, packed_width
from moe_bitnet.tiles import TernaryMatrix, TiledTernary


@dataclass(frozen=True)
class MatrixSizes:
    """The shape of one named weight.

    Attributes:
        out_features: rows of a matrix.
        in_features: columns of a matrix.
    """

    out_features: int
    in_features: int


class PackedModule(nn.Module):
    """Named ternary weights as buffers ``<name>_packed`` (or ``<name>_tiles``) and ``<name>_scale``.

    Args:
        sizes: the matrices by name.
        layout: bits a weight.
        leading: sizes before a matrix's own, such as the number of experts.
    """

    def hold_matrices(self, sizes: dict[str, MatrixSizes], layout: Layout, leading: Sequence[int] = ()) -> None:
        """Register the buffers, with weights of zero bytes that are to be loaded or set."""
        self.layout: Layout = layout
        self._matrix_sizes = sizes
        for name, size in sizes.items():
            shape = (*leading, size.out_features, packed_width(size.in_features, layout))
            self.register_buffer(f"{name}_packed", torch.zeros(shape, dtype=torch.uint8))
            self.register_buffer(f"{name}_tiles", None, persistent=False)
            self.register_buffer(f"{name}_scale", torch.ones(*leading, 1, 1))

    @property
    def matrix_sizes(self) -> dict[str, MatrixSizes]:
        """The weights held here, by name."""
        return dict(self._matrix_sizes)

    def set_matrix(self, name: str, weight_packed: torch.Tensor, weight_scale: torch.Tensor) -> None:
        """Take other portable bytes and their scale."""
        self._buffers[f"{name}_packed"] = weight_packed
        self._buffers[f"{name}_tiles"] = None
        self._buffers[f"{name}_scale"] = weight_scale

    def matrix(self, name: str) -> TernaryMatrix:
        """Return a weight as the kernels take it."""
        size, scale = self._matrix_sizes[name], self.get_buffer(f"{name}_scale")
        tiles = self._buffers[f"{name}_tiles"]
        if tiles is not None:
            return TiledTernary(tiles, scale, size.out_features, size.in_features, self.layout)
        return PackedTernary(self.get_buffer(f"{name}_packed"), scale, size.in_features, self.layout)

    def portable(self, name: str) -> PackedTernary:
        """Return a weight as portable bytes, converted if it is held in tiles."""
        matrix = self.matrix(name)
        if isinstance(matrix, TiledTernary):
            packed: PackedTernary = select("untile", matrix.tiles.device.type)(matrix)
            return packed
        return matrix

    def arrange_weights(self) -> None:
        """Lay all weights out for the kernels, one after the other; the portable bytes are released.

        Raises:
            CheckpointError: a byte encodes no weights.
        """
        for name in self._matrix_sizes:
            matrix = self.matrix(name)
            if isinstance(matrix, PackedTernary) and not matrix.weight_packed.is_meta:
                tiled: TiledTernary = select("tile", matrix.weight_packed.device.type)(matrix)
                self._buffers[f"{name}_packed"] = None
                self._buffers[f"{name}_tiles"] = tiled.tiles

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._matrix_sizes:
            destination[f"{prefix}{name}_packed"] = self.portable(name).weight_packed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        is_arranged = all(self._buffers[f"{name}_tiles"] is not None for name in self._matrix_sizes)
        for name in self._matrix_sizes:
            packed = self.portable(name)
            self.set_matrix(name, packed.weight_packed, packed.weight_scale)
        super()._load_from_state_dict(*args, **kwargs)
        if is_arranged:
            self.arrange_weights()


def arrange_weights(model: nn.Module) -> None:
    """Lay out every packed weight of a model for the kernels, module by module.

    Raises:
        CheckpointError: a byte encodes no weights.
    """
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.arrange_weights()
