"""One batch of one MoE layer on its way through devices: what each does, what has come in, and the sum.

::

    Routing ──part() for each device──► Part ──frame()──► DispatchFrame …… rows or sums ──add()──► sum() ──► [T, H]
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cluster.config import ClusterConfig
from cluster.transport.frames import DispatchFrame
from cluster.transport.row_format import Combine, RowFormat
from moe_bitnet.dispatch import combine
from moe_bitnet.errors import ClusterError
from moe_bitnet.experts import ExpertInput
from moe_bitnet.router import Routing


@dataclass(frozen=True)
class RowRules:
    """How rows travel; see :class:`cluster.config.ClusterConfig`.

    Attributes:
        dispatch: format on the way out.
        combine: what comes back.
        has_dedup: one row for each (token, device) instead of one for each (token, expert).
    """

    dispatch: RowFormat = "int8"
    combine: Combine = field(default_factory=Combine)
    has_dedup: bool = True

    @classmethod
    def of(cls, config: ClusterConfig) -> "RowRules":
        """Take the rules of a configuration."""
        return cls(config.dispatch, config.returned, config.has_dedup)


@dataclass(frozen=True, eq=False)
class Part:
    """What one device does for a batch.

    Attributes:
        device_index: in the plan.
        slots: ``token · K + choice`` of each pair, ascending.
        tokens: int64 ``[n]``, the token of each row.
        pairs_per_row: int64 ``[n]``.
        expert_ids: int64 ``[m]``.
        expert_weights: float32 ``[m]``.
    """

    device_index: int
    slots: np.ndarray
    tokens: Tensor
    pairs_per_row: Tensor
    expert_ids: Tensor
    expert_weights: Tensor

    def frame(self, epoch: int, rows: ExpertInput, batch: "Batch") -> DispatchFrame:
        """Build the frame that asks a host for this part of a batch."""
        taken, combine = rows.take(self.tokens), batch.rules.combine
        return DispatchFrame(
            batch.layer_index,
            epoch,
            taken.rows,
            taken.activation_scale,
            self.expert_ids,
            self.pairs_per_row,
            self.expert_weights if combine.mode == "partial_sums" else None,
            combine,
        )


class Batch:
    """One batch of one layer: what is still to be computed, what has come in, and its sum.

    Attributes:
        layer_index: which MoE layer.
        expert_indices: int64 ``[T, K]``.
        is_open: bool ``[T, K]``, the (token, choice) pairs without a result.
        rules: how rows travel.
    """

    def __init__(self, layer_index: int, routing: Routing, hidden_size: int, rules: RowRules) -> None:
        self.layer_index = layer_index
        self.expert_indices = routing.expert_indices.numpy()
        self.is_open = np.ones(self.expert_indices.shape, bool)
        self.rules = rules
        self._weights, self._hidden_size = routing.expert_weights, hidden_size
        self._rows = torch.empty(self.is_open.size, hidden_size) if rules.combine.mode == "rows" else None
        self._sums: list[tuple[Part, Tensor]] = []

    def part(self, device_index: int, devices: np.ndarray) -> Part:
        """Cut out what one device does.

        Args:
            device_index: in the plan.
            devices: int64 ``[T, K]``, the device of each pair.
        """
        is_here = devices == device_index
        slots = np.flatnonzero(is_here)
        if self.rules.has_dedup:
            pairs = is_here.sum(axis=1)
            tokens = np.flatnonzero(pairs)
            pairs = pairs[tokens]
        else:
            tokens, pairs = slots // devices.shape[1], np.ones(len(slots), np.int64)
        return Part(
            device_index,
            slots,
            torch.from_numpy(tokens),
            torch.from_numpy(pairs),
            torch.from_numpy(self.expert_indices.reshape(-1)[slots]),
            torch.from_numpy(self._weights.numpy().reshape(-1)[slots]),
        )

    def add(self, part: Part, values: Tensor) -> None:
        """Take the float32 rows or sums of a part."""
        if values.shape[1] != self._hidden_size:
            raise ClusterError(
                f"rows of {values.shape[1]} values came back for rows of {self._hidden_size}. Restart the hosts."
            )
        self.is_open.reshape(-1)[part.slots] = False
        if self._rows is not None:
            self._rows[torch.from_numpy(part.slots)] = values
        else:
            self._sums.append((part, values))

    def sum(self) -> Tensor:
        """Add everything up in an order that does not depend on when it came; float32 ``[T, H]``."""
        if self._rows is not None:
            return combine(self._rows, torch.arange(len(self._rows)), self._weights)
        total = torch.zeros(len(self.is_open), self._hidden_size)
        for part, values in sorted(self._sums, key=lambda each: (each[0].device_index, int(each[0].slots[0]))):
            if self.rules.has_dedup:
                total[part.tokens] += values
            else:
                total.index_add_(0, part.tokens, values)
        return total
