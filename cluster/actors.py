"""Ray around the expert host: the actor, and the handle by which its owner directs it.

Rows do not come this way: a :class:`cluster.transport.server.FrameServer` answers them in a thread of the actor.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch

from cluster.directory import Directory
from cluster.expert_host import ExpertHost
from cluster.expert_source import CheckpointSource
from cluster.expert_store import ExpertSlice, ExpertStore, join_slices
from cluster.machine import machine_id
from cluster.transport.bulk import DISPATCHER, BulkChannel, Rendezvous
from cluster.transport.bulk_host import BulkHost
from cluster.transport.server import FrameServer
from cluster.transport.sockets import HostAddress
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import HostDownError, MoEBitNetError
from moe_bitnet.packing import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostSettings:
    """What a host is started with.

    Attributes:
        device_name: of its device.
        usable_bytes: what its experts may fill.
        config: shape and recipe of the model.
        layout: how the experts are packed; ``None`` for float experts.
        epoch: number of the plan that it follows.
        heartbeat_s: see :class:`cluster.config.ClusterConfig`.
        listens_to_network: whether other machines may connect, by the address that Ray knows this one by.
        allowed_keys: public keys of the dispatchers on other machines.
        num_sharers: processes that share the machine's cores; the host takes its part of them.
    """

    device_name: str
    usable_bytes: int
    config: ModelConfig
    layout: Layout | None
    epoch: int
    heartbeat_s: float
    listens_to_network: bool
    allowed_keys: tuple[str, ...]
    num_sharers: int = 1


@dataclass(frozen=True)
class LoadOrder:
    """Experts of one layer that a host shall load, and from where.

    Attributes:
        layer_index: which MoE layer.
        expert_ids: global ids, ascending.
        source: a checkpoint, or references to :class:`ExpertSlice` objects that hold them, among others perhaps.
    """

    layer_index: int
    expert_ids: tuple[int, ...]
    source: CheckpointSource | tuple[Any, ...]

    def fetch(self) -> ExpertSlice:
        """Read the experts, in the process that is to hold them."""
        if isinstance(self.source, CheckpointSource):
            return self.source.slice(self.layer_index, self.expert_ids)
        return join_slices(ray.get(list(self.source)), self.expert_ids)


@ray.remote(num_cpus=0, max_restarts=0)
class ExpertHostActor:
    """One device's experts in a process of their own; see :class:`cluster.expert_host.ExpertHost`.

    It asks Ray for no CPU: a logical device is a share of memory, and a device that
    Ray cannot give would make the creation wait for ever without a word.
    """

    def __init__(self, settings: HostSettings) -> None:
        store = ExpertStore(settings.device_name, settings.usable_bytes, settings.config, settings.layout)
        self._host = ExpertHost(store, settings.epoch)
        self._directory: Directory | None = None
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.num_sharers))
        self._bulk = BulkHost(self._host.answer, self._host.limits)
        self._server = FrameServer(
            settings.device_name,
            self._bulk.answer,
            self._host.limits.max_frame_bytes,
            ray.util.get_node_ip_address() if settings.listens_to_network else None,
            machine_id(),
            settings.heartbeat_s,
        )
        for key in settings.allowed_keys:
            self._server.allow(key)
        self._server.start()

    def address(self) -> HostAddress:
        """Return where the host listens."""
        return self._server.address

    def process_id(self) -> int:
        """Return the id of the host's process."""
        return os.getpid()

    def allow(self, public_key: str) -> None:
        """Let one more dispatcher connect from another machine."""
        self._server.allow(public_key)

    def open_bulk(self, timeout_s: float) -> tuple[int, list[tuple[str, bytes]]]:
        """Begin to open a bulk channel; see :meth:`cluster.transport.bulk_host.BulkHost.open`."""
        return self._bulk.open(ray.util.get_node_ip_address(), timeout_s)

    def put_bulk(self, channel_id: int, key: str, value: bytes) -> None:
        """Take what the dispatcher's end of a bulk channel published."""
        self._bulk.put(channel_id, key, value)

    def load(self, order: LoadOrder) -> int:
        """Take experts beside those that are here; returns the bytes held."""
        return self._host.store.load(order.fetch())

    def expert_ids(self) -> dict[int, list[int]]:
        """Return the experts held, by layer."""
        return self._host.store.all_expert_ids()

    def held_bytes(self) -> int:
        """Return the bytes of all experts held."""
        return self._host.store.held_bytes

    def follow(self, directory: Directory) -> None:
        """Follow one more plan, and tell it to dispatchers that ask."""
        self._directory = directory
        self._host.follow(directory.epoch)

    def directory(self) -> Directory | None:
        """Return the newest plan that this host was told."""
        return self._directory

    def leave_before(self, epoch: int, kept: Mapping[int, Sequence[int]]) -> int:
        """Refuse older plans and keep only these experts (layer → ids); returns the bytes held."""
        self._host.leave_before(epoch)
        return self._host.store.keep(kept)

    def stop(self) -> None:
        """Close the sockets and remove their folder."""
        self._server.stop()


class RayHost:
    """Directs one :class:`ExpertHostActor`.

    Args:
        actor: handle of the actor.
        device_name: for messages.
        timeout_s: seconds to wait for what a call does.
    """

    def __init__(self, actor: Any, device_name: str, timeout_s: float) -> None:
        self.actor = actor
        self.device_name = device_name
        self.timeout_s = timeout_s

    @classmethod
    def start(cls, settings: HostSettings, timeout_s: float, node_id: str | None = None) -> "RayHost":
        """Start a host without waiting for it.

        Args:
            settings: of the host.
            timeout_s: for this and later calls.
            node_id: of the Ray node that has the device; ``None`` leaves it to Ray.
        """
        options: dict[str, Any] = {}
        if node_id is not None:
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
            options["scheduling_strategy"] = strategy
        # Ray's decorator turns the class into something that type checkers do not see
        actor_class: Any = ExpertHostActor
        return cls(actor_class.options(**options).remote(settings), settings.device_name, timeout_s)

    def call(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Call a method of the actor; the returned function waits for its result.

        The returned function raises:
            HostDownError: the host died or is too slow.
            MoEBitNetError: whatever the host raised.
        """
        reference = getattr(self.actor, method).remote(*arguments)
        return lambda: self._wait(reference)

    def open_bulk(self, ip: str, timeout_s: float) -> tuple[BulkChannel, int]:
        """Open a bulk channel to the host.

        Args:
            ip: of this machine, to listen at.
            timeout_s: for connecting, and for each frame.
        Returns:
            this end, and the id by which the host knows it.
        Raises:
            HostDownError: the ends do not find each other.
        """
        channel_id, published = self.call("open_bulk", timeout_s)()
        rendezvous = Rendezvous(lambda key, value: self.call("put_bulk", channel_id, key, value)(), timeout_s)
        for key, value in published:
            rendezvous.put(key, value)
        return BulkChannel(rendezvous, DISPATCHER, ip, timeout_s), channel_id

    def is_alive(self, timeout_s: float) -> bool:
        """Whether the actor answers in time."""
        try:
            ray.get(self.actor.process_id.remote(), timeout=timeout_s)
        except ray.exceptions.RayError:
            return False
        return True

    def kill(self) -> None:
        """End the actor's process at once; one that cannot be reached any more is logged, not raised."""
        try:
            ray.kill(self.actor)
        except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
            logger.warning("host %s could not be ended: %s", self.device_name, error)

    def _wait(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise HostDownError(
                f"host {self.device_name!r} did not start or load within {self.timeout_s} s. "
                f"Raise connect_timeout_s, or look whether the cluster has room for it ('ray status')."
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoEBitNetError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:  # the actor, its node or the answer is gone
            raise HostDownError(f"host {self.device_name!r} died ({error}). Start the hosts again.") from error
