"""The routing of many tokens: for each token and layer the experts that it visited.

In comes ``expert_indices [T, L, K]`` from a recorded run or a generator; placement reads it to put experts that
are visited together on one device, and to share the load.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_bitnet.errors import DataError

IntArray = npt.NDArray[np.signedinteger]

MAX_NUM_EXPERTS = 2**31 - 1

_CHECKED_TOKENS = 65536
"""Sorted at a time, so that checking a long trace does not double its memory."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Experts visited, token after token in the order of the run.

    Attributes:
        expert_indices: ``[num_tokens, num_layers, top_k]`` integers, all different within a token's layer; kept as
            int16 if the expert ids fit, else as int32.
        num_experts: E, routed experts in each layer.

    Raises:
        DataError: another shape or type, nothing in it, an expert that does not exist, or one named twice.
    """

    expert_indices: IntArray
    num_experts: int

    def __post_init__(self) -> None:
        indices = self.expert_indices
        if isinstance(self.num_experts, bool) or not isinstance(self.num_experts, int):
            raise DataError(f"RoutingTrace: num_experts is {self.num_experts!r}; give an integer.")
        if not 1 <= self.num_experts <= MAX_NUM_EXPERTS:
            raise DataError(f"RoutingTrace: num_experts is {self.num_experts}; give 1 to {MAX_NUM_EXPERTS}.")
        if not isinstance(indices, np.ndarray) or indices.ndim != 3 or indices.dtype.kind not in "iu":
            given = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, np.ndarray) else repr(type(indices))
            raise DataError(f"RoutingTrace: expert_indices is {given}; give integers [num_tokens, num_layers, top_k].")
        if indices.size == 0:
            raise DataError(
                f"RoutingTrace: expert_indices {list(indices.shape)} is empty. Give a token, a layer and a choice."
            )
        check_choices(indices, self.num_experts)
        object.__setattr__(self, "expert_indices", np.ascontiguousarray(indices, dtype=index_dtype(self.num_experts)))

    @property
    def num_tokens(self) -> int:
        """T, tokens in the trace."""
        return int(self.expert_indices.shape[0])

    @property
    def num_layers(self) -> int:
        """L, layers that hold a mixture of experts."""
        return int(self.expert_indices.shape[1])

    @property
    def top_k(self) -> int:
        """K, experts that a token visits in a layer."""
        return int(self.expert_indices.shape[2])

    def layer(self, layer_index: int) -> IntArray:
        """Return the routing of one layer, ``[num_tokens, top_k]``."""
        return self.expert_indices[:, layer_index]

    def tokens_per_expert(self, layer_index: int) -> npt.NDArray[np.int64]:
        """Count the visits to each expert of one layer, ``[num_experts]``."""
        return np.bincount(self.layer(layer_index).ravel(), minlength=self.num_experts).astype(np.int64)

    def for_layers(self, layer_indices: Sequence[int]) -> "RoutingTrace":
        """Return the trace of some layers, in the given order.

        Raises:
            DataError: no layer is named, or one that the trace does not have.
        """
        unknown = [index for index in layer_indices if not 0 <= index < self.num_layers]
        if unknown or not layer_indices:
            raise DataError(
                f"RoutingTrace: layers {list(layer_indices)} were asked for; name at least one, each from 0 to "
                f"{self.num_layers - 1}."
            )
        return RoutingTrace(self.expert_indices[:, list(layer_indices)], self.num_experts)

    def split_half(self) -> tuple["RoutingTrace", "RoutingTrace"]:
        """Return the first and the second half in time; the first is larger by one if the number is odd.

        A plan is made from the past and used in the future, so that is how it is tested. Interleaved tokens would
        put neighbours, which resemble each other, on both sides, and make a plan look better than it is.

        Raises:
            DataError: the trace has one token.
        """
        if self.num_tokens < 2:
            raise DataError("RoutingTrace: one token cannot be split in half. Record more.")
        middle = (self.num_tokens + 1) // 2
        return (
            RoutingTrace(self.expert_indices[:middle], self.num_experts),
            RoutingTrace(self.expert_indices[middle:], self.num_experts),
        )


def index_dtype(num_experts: int) -> type[np.signedinteger]:
    """Return the integer type that expert ids are kept in."""
    return np.int16 if num_experts <= np.iinfo(np.int16).max + 1 else np.int32


def check_choices(expert_indices: IntArray, num_experts: int) -> None:
    """Check ``[..., top_k]`` expert ids.

    Raises:
        DataError: an id is out of range, or twice within a row.
    """
    smallest, largest = int(expert_indices.min()), int(expert_indices.max())
    if smallest < 0 or largest >= num_experts:
        raise DataError(
            f"expert ids range from {smallest} to {largest}; a layer has the experts 0 to {num_experts - 1}. "
            f"Give the routing of the same model."
        )
    for start in range(0, len(expert_indices), _CHECKED_TOKENS):
        in_order = np.sort(expert_indices[start : start + _CHECKED_TOKENS], axis=-1)
        if (in_order[..., 1:] == in_order[..., :-1]).any():
            raise DataError("an expert is named twice in one token's layer. Give top_k different experts.")
