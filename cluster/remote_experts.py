"""An ``ExpertExecutor`` whose experts live on other devices.

::

    hidden_states [T, H] ──quantize once──► int8 rows ──one frame a device──► hosts
                                               └──► experts at home, while the hosts work
    rows, or one weighted sum a (token, device) ◄── hosts,   added up at home in a fixed order

A token's row crosses to a device once, however many of its experts are there; an expert with a copy at home costs
nothing. With float32 rows on the way back the sum runs over a token's choices as in one process, and gives the same
bits whatever the placement (float experts with replicas alone may differ in the last bit: BLAS sums in an order that
depends on how many rows an expert gets at once). With partial sums less comes back, added up in another order.

Hosts keep nothing between frames, so a lost host costs its frames alone: they are sent again to other copies; where
there is none, ``recover`` may bring a new plan; else there is an error. An expert is never left out.

Forward only: no gradient passes the hosts.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.config import ClusterConfig
from cluster.expert_store import ExpertStore
from cluster.partial_sums import sum_pairs
from cluster.placement.placement import Placement
from cluster.placement.replica_choice import NO_DEVICE, ReplicaTable
from cluster.transport.frames import CombineFrame, DispatchFrame
from cluster.transport.links import Answer
from cluster.transport.meter import Direction, TrafficMeter, frame_sizes
from cluster.transport.row_format import Combine, RowFormat
from cluster.transport.sockets import HostAddress
from moe_bitnet.dispatch import combine
from moe_bitnet.errors import ClusterError, HostDownError, StalePlanError
from moe_bitnet.experts import ExpertInput
from moe_bitnet.kernels import select
from moe_bitnet.router import Routing

HOME = 0
"""Index of the device where tokens live and results are added up."""

_MAX_ATTEMPTS = 16
_LOAD_MEMORY = 0.9
_FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Links(Protocol):
    """Ways to reach the expert hosts, as :class:`cluster.transport.links.HostLinks`."""

    def set_addresses(self, addresses: Iterable[HostAddress]) -> None:
        """Connect to these hosts and leave all others."""
        ...

    def is_up(self, name: str) -> bool:
        """Whether a host can be asked."""
        ...

    def is_encrypted(self, name: str) -> bool:
        """Whether frames to a host are encrypted."""
        ...

    def send(self, name: str, frame: DispatchFrame) -> int:
        """Send a frame without waiting; returns its request id."""
        ...

    def wait(self, requests: Mapping[str, int]) -> Iterator[Answer]:
        """Yield the answers to requests as they come."""
        ...


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
class DispatchPlan:
    """A placement in force.

    Attributes:
        epoch: its number; hosts refuse the frames of another.
        placement: devices of every expert; device 0 is the home.
        tables: one for each layer, made from the placement.
    """

    epoch: int
    placement: Placement
    tables: tuple[ReplicaTable, ...]

    @classmethod
    def of(cls, placement: Placement, epoch: int = 0) -> "DispatchPlan":
        """Number a placement."""
        layers = placement.devices_of_expert
        return cls(epoch, placement, tuple(ReplicaTable(layer, placement.num_devices) for layer in layers))


Recover = Callable[["Dispatcher", list[str]], None]
"""Called with the names of devices that are down, some of which hold the only copies of experts, or with none after
a refusal for a stale plan. It must put a new plan in force (:meth:`Dispatcher.follow`), bring a host back, or raise."""


class Dispatcher:
    """Sends rows of all layers by one plan, which may be replaced at any time between two layers.

    Args:
        plan: to begin with.
        links: to the hosts.
        home: the experts of device 0, computed in this process.
        meter: counts what every frame weighs; layer 0 counts the tokens.
        rules: how rows travel.
        recover: see :data:`Recover`; without it, experts that are out of reach are an error.
    """

    def __init__(
        self,
        plan: DispatchPlan,
        links: Links,
        home: ExpertStore,
        meter: TrafficMeter,
        rules: RowRules,
        recover: Recover | None = None,
    ) -> None:
        self._plan, self._links, self._home, self._meter = plan, links, home, meter
        self._rules, self._recover = rules, recover
        self._load = np.zeros(plan.placement.num_devices)  # pairs that each device got lately
        self._lock = threading.RLock()

    @property
    def plan(self) -> DispatchPlan:
        """The plan in force."""
        return self._plan

    def follow(self, plan: DispatchPlan, addresses: Iterable[HostAddress]) -> None:
        """Put another plan in force; returns when no frame of the old one is on its way."""
        with self._lock:
            self._links.set_addresses(addresses)
            self._plan = plan

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send nothing within the block, so that another thread may use the links."""
        with self._lock:
            yield

    def run(self, layer_index: int, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of each token's experts; see :class:`moe_bitnet.experts.ExpertExecutor`.

        Raises:
            ClusterError: experts are out of reach, or a host refuses the rows.
        """
        if layer_index == 0:
            self._meter.add_tokens(len(hidden_states))
        batch = _Batch(layer_index, routing, hidden_states.shape[1], self._rules)
        with torch.inference_mode():
            rows = self._prepare(hidden_states)
            for _ in range(_MAX_ATTEMPTS):
                with self._lock:
                    unreached = self._attempt(batch, rows)
                if unreached is not None:
                    self._recover_or_raise(unreached)  # without the lock: recovery may need other threads' work
                elif not batch.is_open.any():
                    return batch.sum()
        raise HostDownError(
            f"layer {layer_index}: experts did not answer in {_MAX_ATTEMPTS} attempts. Look at the logs of the hosts."
        )

    def _attempt(self, batch: "_Batch", rows: ExpertInput) -> "_Unreached | None":
        """Ask for everything that is still open; returns what needs a recovery, or ``None``."""
        plan = self._plan
        names = plan.placement.device_names
        is_up = np.array([index == HOME or self._links.is_up(name) for index, name in enumerate(names)])
        if len(self._load) != len(names):
            self._load = np.zeros(len(names))
        devices = plan.tables[batch.layer_index].choose(batch.expert_indices, is_up, self._load)
        is_lost = (devices == NO_DEVICE) & batch.is_open
        if is_lost.any():
            expert_id = int(batch.expert_indices[is_lost][0])
            holders = [names[index] for index in plan.placement.devices_of_expert[batch.layer_index][expert_id]]
            down = [name for name, up in zip(names, is_up, strict=True) if not up]
            return _Unreached(
                down,
                HostDownError(
                    f"expert {expert_id} of layer {batch.layer_index} is out of reach: {', '.join(holders)} did not "
                    f"answer. Start the hosts again, or place replicas."
                ),
            )
        devices = np.where(batch.is_open, devices, NO_DEVICE)
        parts = [batch.part(int(device), devices) for device in np.unique(devices) if device != NO_DEVICE]
        for part in parts:
            self._load[part.device_index] += len(part.slots)
        self._load *= _LOAD_MEMORY
        return self._exchange(plan, batch, parts, rows)

    def _prepare(self, hidden_states: Tensor) -> ExpertInput:
        """Return the rows as they travel."""
        if self._rules.dispatch == "int8":
            return ExpertInput(*select("quantize_activation", hidden_states.device.type)(hidden_states))
        return ExpertInput(hidden_states.to(_FLOAT_DTYPES[self._rules.dispatch]), None)

    def _exchange(
        self, plan: DispatchPlan, batch: "_Batch", parts: "list[_Part]", rows: ExpertInput
    ) -> "_Unreached | None":
        """Send all parts, compute the home's, take the answers; the parts that got none stay open."""
        names = plan.placement.device_names
        waiting = {names[part.device_index]: part for part in parts if part.device_index != HOME}
        requests = {}
        for name, part in waiting.items():
            frame = part.frame(batch.layer_index, plan.epoch, rows, self._rules.combine)
            requests[name] = self._links.send(name, frame)
            self._record(names[HOME], name, batch.layer_index, "dispatch", frame)
        for part in parts:
            if part.device_index == HOME:
                batch.add(part, self._compute_at_home(batch.layer_index, part, rows))
        unreached = None
        for answer in self._links.wait(requests) if requests else ():
            part = waiting[answer.device_name]
            if answer.frame is not None:
                part.check(answer.frame, answer.device_name, batch.layer_index, plan.epoch, self._rules.combine)
                self._record(answer.device_name, names[HOME], batch.layer_index, "combine", answer.frame)
                batch.add(part, answer.frame.values())
            elif isinstance(answer.error, StalePlanError):
                unreached = _Unreached([], answer.error)
            elif not isinstance(answer.error, HostDownError):
                assert answer.error is not None
                raise answer.error
        return unreached

    def _recover_or_raise(self, unreached: "_Unreached") -> None:
        if self._recover is None:
            raise unreached.error
        self._recover(self, unreached.down)

    def _compute_at_home(self, layer_index: int, part: "_Part", rows: ExpertInput) -> Tensor:
        taken = rows.take(part.tokens)
        if taken.activation_scale is None:
            taken = self._home.prepare(taken.rows.float())
        outputs = self._home.compute(layer_index, taken, part.pairs_per_row, part.expert_ids)
        if self._rules.combine.mode == "rows":
            return outputs
        return sum_pairs(outputs, part.expert_weights, part.pairs_per_row)

    def _record(
        self,
        source: str,
        destination: str,
        layer_index: int,
        direction: Direction,
        frame: DispatchFrame | CombineFrame,
    ) -> None:
        far_end = destination if direction == "dispatch" else source
        sizes = frame_sizes(frame, self._links.is_encrypted(far_end))
        self._meter.record(source, destination, layer_index, direction, sizes)


@dataclass(frozen=True)
class _Unreached:
    """Experts that no copy answers for.

    Attributes:
        down: names of all devices that are down; empty if hosts follow another plan.
        error: to raise if nothing can be done.
    """

    down: list[str]
    error: ClusterError


class RemoteExperts:
    """Runs the routed experts of one layer through a dispatcher.

    Args:
        layer_index: which MoE layer this is.
        dispatcher: shared by all layers.
    """

    def __init__(self, layer_index: int, dispatcher: Dispatcher) -> None:
        self._layer_index = layer_index
        self._dispatcher = dispatcher

    def run(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Fulfil :class:`moe_bitnet.experts.ExpertExecutor`.

        Raises:
            ClusterError: experts are out of reach, or a host refuses the rows.
        """
        return self._dispatcher.run(self._layer_index, hidden_states, routing)


@dataclass(frozen=True, eq=False)
class _Part:
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

    def frame(self, layer_index: int, epoch: int, rows: ExpertInput, combine: Combine) -> DispatchFrame:
        """Build the frame that asks a host for this part."""
        taken = rows.take(self.tokens)
        return DispatchFrame(
            layer_index,
            epoch,
            taken.rows,
            taken.activation_scale,
            self.expert_ids,
            self.pairs_per_row,
            self.expert_weights if combine.mode == "partial_sums" else None,
            combine,
        )

    def check(self, answer: CombineFrame, name: str, layer_index: int, epoch: int, combine: Combine) -> None:
        """Check that an answer is one to this part's frame."""
        num_rows = len(self.slots) if combine.mode == "rows" else len(self.tokens)
        given = (answer.layer_index, answer.epoch, len(answer.rows), answer.row_format)
        asked = (layer_index, epoch, num_rows, combine.row_format)
        if given != asked:
            raise ClusterError(
                f"host {name!r} answered layer, plan, rows and format {given}; {asked} was asked. Restart the hosts."
            )


class _Batch:
    """One batch of one layer: what is still to be computed, what has come in, and its sum.

    Attributes:
        layer_index: which MoE layer.
        expert_indices: int64 ``[T, K]``.
        is_open: bool ``[T, K]``, the (token, choice) pairs without a result.
    """

    def __init__(self, layer_index: int, routing: Routing, hidden_size: int, rules: RowRules) -> None:
        self.layer_index = layer_index
        self.expert_indices = routing.expert_indices.numpy()
        self.is_open = np.ones(self.expert_indices.shape, bool)
        self._weights, self._hidden_size, self._rules = routing.expert_weights, hidden_size, rules
        self._rows = torch.empty(self.is_open.size, hidden_size) if rules.combine.mode == "rows" else None
        self._sums: list[tuple[_Part, Tensor]] = []

    def part(self, device_index: int, devices: np.ndarray) -> _Part:
        """Cut out what one device does.

        Args:
            device_index: in the plan.
            devices: int64 ``[T, K]``, the device of each pair.
        """
        is_here = devices == device_index
        slots = np.flatnonzero(is_here)
        if self._rules.has_dedup:
            pairs = is_here.sum(axis=1)
            tokens = np.flatnonzero(pairs)
            pairs = pairs[tokens]
        else:
            tokens, pairs = slots // devices.shape[1], np.ones(len(slots), np.int64)
        return _Part(
            device_index,
            slots,
            torch.from_numpy(tokens),
            torch.from_numpy(pairs),
            torch.from_numpy(self.expert_indices.reshape(-1)[slots]),
            torch.from_numpy(self._weights.numpy().reshape(-1)[slots]),
        )

    def add(self, part: _Part, values: Tensor) -> None:
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
            if self._rules.has_dedup:
                total[part.tokens] += values
            else:
                total.index_add_(0, part.tokens, values)
        return total
