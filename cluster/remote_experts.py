"""An ``ExpertExecutor`` whose experts live on other devices.

::

    hidden_states [T, H] ──quantize once──► int8 rows ──one frame a device──► hosts
    outputs [T·K, H] ◄──one float row a (token, expert)── hosts,  then ``dispatch.combine`` at home

A token's row crosses to a device once, however many of its experts are there.
The experts' rows are added at home in the order of the token's choices, exactly
as the local executor does it: with float32 rows on the way back the sum is the
local one bit for bit.

Forward only: no gradient passes the hosts.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.placement.placement import Placement
from cluster.transport.codec import decode_combine, encode
from cluster.transport.frames import (
    HEADER_BYTES,
    CombineFrame,
    DispatchFrame,
    metadata_bytes,
    payload_bytes,
)
from cluster.transport.header import FrameLimits
from cluster.transport.meter import Direction, TrafficMeter
from cluster.transport.row_format import RowFormat
from moe_bitnet.dispatch import combine
from moe_bitnet.errors import ClusterError
from moe_bitnet.kernels import select
from moe_bitnet.router import Routing

HOME = 0
"""Index of the device where tokens live and results are added up."""


class ExpertHostClient(Protocol):
    """A way to reach one expert host."""

    def send(self, frame: bytes) -> Callable[[], bytes]:
        """Send a dispatch frame without waiting; the returned function waits for the combine frame."""
        ...


class RemoteExperts:
    """Runs the routed experts of one layer on the hosts of a placement.

    Args:
        layer_index: which MoE layer this is.
        placement: device of every expert; device 0 is the home.
        clients: one for each device of the placement, in its order.
        meter: counts what every frame weighs; layer 0 counts the tokens.
        dispatch: format of the rows on the way out; ``"int8"`` for ternary experts.
        epoch: number of the plan that the hosts follow.
    """

    def __init__(
        self,
        layer_index: int,
        placement: Placement,
        clients: Sequence[ExpertHostClient],
        meter: TrafficMeter,
        dispatch: RowFormat,
        epoch: int = 0,
    ) -> None:
        self._layer_index = layer_index
        self._device_names = placement.device_names
        self._device_of_expert = torch.tensor(placement.primary_devices(layer_index))
        self._clients = clients
        self._meter = meter
        self._dispatch: RowFormat = dispatch
        self._epoch = epoch

    def run(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Fulfil :class:`moe_bitnet.experts.ExpertExecutor`.

        Raises:
            ClusterError: a host does not answer, refuses the frame, or answers something else.
        """
        rows, scales = self._prepare(hidden_states)
        devices = self._device_of_expert[routing.expert_indices]  # [T, K]
        waiting = []
        for device_index in torch.unique(devices).tolist():
            frame, slots = self._frame_for(devices == device_index, routing, rows, scales)
            self._record(HOME, device_index, "dispatch", frame)
            waiting.append((device_index, slots, self._clients[device_index].send(encode(frame))))
        num_tokens, top_k = routing.expert_indices.shape
        outputs = hidden_states.new_empty((num_tokens * top_k, hidden_states.shape[-1]), dtype=torch.float32)
        for device_index, slots, receive in waiting:
            answer = decode_combine(receive(), FrameLimits(max_hidden_size=hidden_states.shape[-1]))
            self._check(answer, device_index, (len(slots), hidden_states.shape[-1]))
            self._record(device_index, HOME, "combine", answer)
            outputs[slots] = answer.rows.float()
        if self._layer_index == 0:
            self._meter.add_tokens(num_tokens)
        return combine(outputs, torch.arange(num_tokens * top_k), routing.expert_weights)

    def _prepare(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._dispatch == "int8":
            rows, scales = select("quantize_activation", hidden_states.device.type)(hidden_states)
            return rows, scales
        return hidden_states.to(torch.float16 if self._dispatch == "float16" else torch.float32), None

    def _frame_for(
        self, is_here: Tensor, routing: Routing, rows: Tensor, scales: Tensor | None
    ) -> tuple[DispatchFrame, Tensor]:
        """Build the frame of one device.

        Args:
            is_here: bool ``[T, K]``, the choices whose expert lives on the device.
            routing: of all tokens.
            rows: ``[T, H]``.
            scales: ``[T, 1]`` or ``None``.
        Returns:
            the frame, and the slot (``token · K + choice``) of each of its pairs.
        """
        slots = is_here.flatten().nonzero().squeeze(1)
        expert_ids = routing.expert_indices.flatten()[slots]
        order = expert_ids.argsort(stable=True)
        slots, expert_ids = slots[order], expert_ids[order]
        tokens = slots // is_here.shape[1]
        sent_tokens, row_indices = torch.unique(tokens, return_inverse=True)  # each token once
        frame = DispatchFrame(
            self._layer_index,
            self._epoch,
            rows[sent_tokens],
            expert_ids.int(),
            row_indices.int(),
            None if scales is None else scales[sent_tokens],
        )
        return frame, slots

    def _check(self, answer: CombineFrame, device_index: int, shape: tuple[int, int]) -> None:
        if (answer.layer_index, answer.epoch) != (self._layer_index, self._epoch) or answer.rows.shape != shape:
            raise ClusterError(
                f"host {self._device_names[device_index]!r} answered layer {answer.layer_index} of plan {answer.epoch} "
                f"with rows {list(answer.rows.shape)}; layer {self._layer_index} of plan {self._epoch} with "
                f"{list(shape)} was asked. Restart the hosts."
            )

    def _record(self, source: int, target: int, direction: Direction, frame: DispatchFrame | CombineFrame) -> None:
        names = self._device_names
        self._meter.record(
            names[source],
            names[target],
            self._layer_index,
            direction,
            payload_bytes(frame),
            metadata_bytes(frame),
            HEADER_BYTES,
        )
