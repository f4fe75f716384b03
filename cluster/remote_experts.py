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
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.dispatch_batch import Batch, Part, RowRules
from cluster.expert_store import ExpertStore
from cluster.partial_sums import sum_pairs, to_format
from cluster.placement.placement import Placement
from cluster.placement.replica_choice import HOME, NO_DEVICE, ReplicaTable
from cluster.transport.frames import CombineFrame, DispatchFrame
from cluster.transport.links import Answer
from cluster.transport.meter import Direction, TrafficMeter, frame_sizes
from cluster.transport.sockets import HostAddress
from moe_bitnet.errors import ClusterError, HostDownError, StalePlanError
from moe_bitnet.experts import ExpertInput
from moe_bitnet.router import Routing

_MAX_ATTEMPTS = 16
_LOAD_MEMORY = 0.9


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
        batch = Batch(layer_index, routing, hidden_states.shape[1], self._rules)
        with torch.inference_mode():
            rows = ExpertInput(*to_format(hidden_states, self._rules.dispatch))
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

    def _attempt(self, batch: Batch, rows: ExpertInput) -> "_Unreached | None":
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

    def _exchange(self, plan: DispatchPlan, batch: Batch, parts: list[Part], rows: ExpertInput) -> "_Unreached | None":
        """Send all parts, compute the home's, take the answers; the parts that got none stay open."""
        names = plan.placement.device_names
        waiting: dict[str, tuple[Part, DispatchFrame]] = {}
        requests = {}
        for part in parts:
            if part.device_index != HOME:
                name, frame = names[part.device_index], part.frame(plan.epoch, rows, batch)
                waiting[name], requests[name] = (part, frame), self._links.send(name, frame)
                self._record(names[HOME], name, "dispatch", frame)
        for part in parts:
            if part.device_index == HOME:
                batch.add(part, self._compute_at_home(batch.layer_index, part, rows))
        unreached = None
        for answer in self._links.wait(requests) if requests else ():
            part, frame = waiting[answer.device_name]
            if answer.frame is not None:
                _check_answer(answer.frame, frame, answer.device_name)
                self._record(answer.device_name, names[HOME], "combine", answer.frame)
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

    def _compute_at_home(self, layer_index: int, part: "Part", rows: ExpertInput) -> Tensor:
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
        direction: Direction,
        frame: DispatchFrame | CombineFrame,
    ) -> None:
        far_end = destination if direction == "dispatch" else source
        sizes = frame_sizes(frame, self._links.is_encrypted(far_end))
        self._meter.record(source, destination, frame.layer_index, direction, sizes)


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


def _check_answer(answer: CombineFrame, frame: DispatchFrame, name: str) -> None:
    """Check that what a host sent is an answer to a frame."""
    given = (answer.layer_index, answer.epoch, len(answer.rows), answer.row_format)
    asked = (frame.layer_index, frame.epoch, frame.num_answer_rows, frame.combine.row_format)
    if given != asked:
        raise ClusterError(
            f"host {name!r} answered layer, plan, rows and format {given}; {asked} was asked. Restart the hosts."
        )
