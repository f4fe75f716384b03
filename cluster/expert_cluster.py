"""The life of expert hosts: start, health, another placement while generating, recovery of lost experts, end.

A change of placement never stops the work: the new plan's experts are loaded beside the old ones, hosts are told to
follow both, the dispatcher switches between two layers, and only then does what is no longer needed go.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.actors import HostSettings, RayHost
from cluster.config import ClusterConfig
from cluster.directory import Directory
from cluster.expert_source import CheckpointSource
from cluster.expert_store import ExpertStore, slice_experts
from cluster.joining import Invitation
from cluster.machine import machine_id
from cluster.placement.evacuation import evacuate
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.ray_metrics import MetricsPublisher
from cluster.remote_experts import HOME, Dispatcher, DispatchPlan, RemoteExperts, RowRules
from cluster.shelf import Shelf
from cluster.transport.header import FrameLimits
from cluster.transport.links import BulkPath, HostLinks, LinkTimes
from cluster.transport.meter import TrafficMeter
from cluster.transport.sockets import HostAddress, KeyPair, remove_socket_folder
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.errors import ClusterError, HostDownError, MoEBitNetError, PlacementError
from moe_bitnet.experts import GroupedExperts
from moe_bitnet.model import Block, MoETransformer

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with a device's name, and the bytes of experts loaded so far and in all."""

_ALIVE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class HostHealth:
    """What is known of one device.

    Attributes:
        device_name: of the device; the first is the home.
        is_up: whether it answers.
        held_bytes: of experts, ``None`` if it does not answer.
        round_trip_s: of a frame without rows; 0 at home, ``None`` if it does not answer.
    """

    device_name: str
    is_up: bool
    held_bytes: int | None
    round_trip_s: float | None


class ExpertCluster:
    """Running expert hosts of one model; made by :func:`cluster.runtime.start_expert_hosts`.

    Args:
        model: on the CPU, with its experts in place.
        problem: gives the memory of each device.
        placement: devices of every expert.
        config: row formats and time-outs.
        checkpoint: from which hosts read experts; without it they come through Ray's object store.
        on_progress: called while weights load.

    Raises:
        MoEBitNetError: the hosts cannot be started; those that were are gone.
    """

    def __init__(
        self,
        model: MoETransformer,
        problem: PlacementProblem,
        placement: Placement,
        config: ClusterConfig,
        checkpoint: CheckpointSource | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._model_config, self._layout = model.config, model_layout(model)
        self._problem, self._config = problem, config
        self._on_progress = on_progress or (lambda name, loaded, total: None)
        self._shelf = Shelf(checkpoint)
        self._keys = KeyPair.generate()
        self._hosts: dict[str, RayHost] = {}
        self._addresses: dict[str, HostAddress] = {}
        self._lock = threading.RLock()  # one change of plan at a time
        self._layers = [_experts_of(block) for block in model.blocks]
        self.meter = TrafficMeter()
        self._home = ExpertStore(placement.device_names[HOME], self._room(placement, HOME), model.config, self._layout)
        self._links = HostLinks(
            machine_id(), self._keys, FrameLimits(max_hidden_size=model.config.hidden_size), LinkTimes.of(config)
        )
        plan = DispatchPlan.of(placement)
        self._dispatcher = Dispatcher(plan, self._links, self._home, self.meter, RowRules.of(config), self._recover)
        self._metrics = MetricsPublisher(self.meter)
        try:
            self._fill_home(placement)
            self._bring(placement, plan.epoch)
            self._dispatcher.follow(plan, self._addresses.values())
            for name in self._hosts:
                self._links.probe(name)  # warm up: connected, and the handshake done
            self._open_bulk()
            self._announce(plan)
        except BaseException:
            self.close()
            raise
        self._layers = []  # from now on the home's store and the shelf hold the experts
        self.executors = [RemoteExperts(index, self._dispatcher) for index in range(placement.num_layers)]

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self._dispatcher.plan.placement

    @property
    def epoch(self) -> int:
        """The number of the plan in force."""
        return self._dispatcher.plan.epoch

    @property
    def invitation(self) -> Invitation:
        """What another process of the same Ray cluster needs for ``cluster.joining.join_expert_hosts``."""
        with self._lock:
            directory = Directory(self.epoch, self.placement, tuple(self._addresses.values()))
            actors = {name: host.actor for name, host in self._hosts.items()}
            return Invitation(directory, actors, self._home.usable_bytes, self._config)

    @property
    def hosts(self) -> Mapping[str, RayHost]:
        """The hosts by their device's name; the home has none."""
        return dict(self._hosts)

    def health(self) -> list[HostHealth]:
        """Ask every host whether it is there, and what it holds."""
        states = [HostHealth(self._home.device_name, True, self._home.held_bytes, 0.0)]
        for name, host in self._hosts.items():
            try:
                held_bytes = host.call("held_bytes")()
                with self._dispatcher.paused():
                    round_trip_s = self._links.probe(name)
                states.append(HostHealth(name, True, held_bytes, round_trip_s))
            except ClusterError:
                states.append(HostHealth(name, False, None, None))
        return states

    def rebalance(self, placement: Placement, problem: PlacementProblem | None = None) -> None:
        """Put another placement in force while the model goes on.

        Args:
            placement: of the same experts; its home is the same device.
            problem: if the devices are others than before.
        Raises:
            PlacementError: it does not fit, is of other experts, or moves the home; all stays as it was.
            ClusterError: a host cannot be started or does not answer; all stays as it was.
        """
        with self._lock:
            problem = problem or self._problem
            placement.check(problem)
            old = self.placement
            if placement.device_names[HOME] != old.device_names[HOME]:
                raise PlacementError(
                    f"the home is {old.device_names[HOME]!r} and cannot move to {placement.device_names[HOME]!r} "
                    f"while the model runs. Put {old.device_names[HOME]!r} first."
                )
            self._problem, old_problem = problem, self._problem
            plan = DispatchPlan.of(placement, self.epoch + 1)
            try:
                self._shelve(placement)
                self._fill_home(placement)
                self._bring(placement, plan.epoch)
                self._announce(plan)
            except MoEBitNetError:
                self._problem = old_problem
                self._leave(old, self.epoch)
                raise
            self._dispatcher.follow(plan, [self._addresses[name] for name in self._names(placement)])
            self._open_bulk()
            self._leave(placement, plan.epoch)
            logger.info("plan %d is in force on %d devices", plan.epoch, placement.num_devices)

    def close(self) -> None:
        """End all hosts and connections."""
        with self._dispatcher.paused():
            self._links.close()
        for host in self._hosts.values():
            try:
                RayHost(host.actor, host.device_name, _ALIVE_TIMEOUT_S).call("stop")()
            except MoEBitNetError as error:
                logger.info("host %s did not stop by itself (%s)", host.device_name, error)
            host.kill()
        for address in self._addresses.values():
            remove_socket_folder(address, machine_id())  # of hosts that were killed and could not do it themselves
        self._hosts.clear()
        self._metrics.close()

    # --- Steps of a change

    def _names(self, placement: Placement) -> list[str]:
        """Return the devices of a placement that need a host: all with experts, except the home."""
        return [
            name
            for index, name in enumerate(placement.device_names)
            if index != HOME and any(placement.expert_ids_on(index, layer) for layer in range(placement.num_layers))
        ]

    def _room(self, placement: Placement, device_index: int) -> int:
        name = placement.device_names[device_index]
        usable = next(each.usable_bytes for each in self._problem.topology.devices if each.name == name)
        return usable - (self._problem.home_bytes if device_index == HOME else 0)

    def _shelve(self, placement: Placement) -> None:
        """Keep experts that leave the home where hosts can fetch them."""
        for layer_index in range(placement.num_layers):
            held = set(self._home.expert_ids(layer_index))
            away = {
                each
                for index in range(1, placement.num_devices)
                for each in placement.expert_ids_on(index, layer_index)
            }
            part = self._home.slice(layer_index, self._shelf.lacks(layer_index, sorted(held & away)))
            if part is not None:
                self._shelf.put_slice(part)

    def _fill_home(self, placement: Placement) -> None:
        """Load what the home lacks: from the model at the start, later from the shelf."""
        self._home.usable_bytes = self._room(placement, HOME)
        for layer_index in range(placement.num_layers):
            missing = _lacking(placement.expert_ids_on(HOME, layer_index), self._home.expert_ids(layer_index))
            if missing and self._layers:
                self._home.load(slice_experts(self._layers[layer_index], layer_index, missing))
            elif missing:
                self._home.load(self._shelf.order(layer_index, missing).fetch())
        self._on_progress(self._home.device_name, self._home.held_bytes, self._home.held_bytes)

    def _bring(self, placement: Placement, epoch: int) -> None:
        """Start the hosts that a placement needs, and load what they lack."""
        names = self._names(placement)
        for name in names:
            if name not in self._hosts:
                self._hosts[name] = self._start(placement, name, epoch)
        waiting = {name: self._hosts[name].call("address") for name in names if name not in self._addresses}
        for name, wait in waiting.items():
            self._addresses[name] = wait()
        self._load(placement, names)

    def _start(self, placement: Placement, name: str, epoch: int) -> RayHost:
        device = next(each for each in self._problem.topology.devices if each.name == name)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        if device.node_id is not None and device.node_id not in nodes:  # Ray would wait for it without a word
            raise ClusterError(
                f"device {name!r} is on node {device.node_id}, which is none of the {len(nodes)} nodes of this Ray "
                f"cluster that are alive. Discover the topology again, or leave the device out."
            )
        settings = HostSettings(
            name,
            self._room(placement, placement.device_names.index(name)),
            self._model_config,
            self._layout,
            epoch,
            self._config.heartbeat_s,
            listens_to_network=len(nodes) > 1,
            allowed_keys=(self._keys.public,),
            num_sharers=self._num_sharers(placement, device.node_id),
        )
        return RayHost.start(settings, self._config.connect_timeout_s, device.node_id)

    def _open_bulk(self) -> None:
        """Open bulk channels to hosts on other machines that have none, if they are asked for."""
        min_bytes, timeout_s = self._config.bulk_min_bytes, self._config.request_timeout_s
        if min_bytes is None:
            return
        for name, host in self._hosts.items():
            with self._dispatcher.paused():
                if not self._links.is_encrypted(name) or self._links.has_bulk(name):
                    continue
                try:
                    channel, channel_id = host.open_bulk(ray.util.get_node_ip_address(), timeout_s)
                except HostDownError as error:
                    logger.warning("host %s gets large frames by its encrypted socket: %s", name, error)
                else:
                    self._links.use_bulk(name, BulkPath(channel, channel_id, min_bytes))

    def _num_sharers(self, placement: Placement, node_id: str | None) -> int:
        """Count the processes that share a node's cores: its hosts, and this one if it is there."""
        nodes = {device.name: device.node_id for device in self._problem.topology.devices}
        num_hosts = sum(nodes[name] == node_id for name in self._names(placement))
        return num_hosts + (node_id in (None, ray.get_runtime_context().get_node_id()))

    def _load(self, placement: Placement, names: Sequence[str]) -> None:
        """Load layer by layer, all hosts at once, and say how far it is."""
        held = {name: self._hosts[name].call("expert_ids") for name in names}
        lacking = {}
        for name, wait in held.items():
            here, index = wait(), placement.device_names.index(name)
            lacking[name] = [
                _lacking(placement.expert_ids_on(index, layer_index), here.get(layer_index, ()))
                for layer_index in range(placement.num_layers)
            ]
        totals = {name: self._problem.expert_bytes * sum(map(len, layers)) for name, layers in lacking.items()}
        loaded = dict.fromkeys(names, 0)
        for layer_index in range(placement.num_layers):
            waiting = {}
            for name in names:
                missing = lacking[name][layer_index]
                if missing:
                    if self._layers:
                        self._shelf.put(self._layers[layer_index], layer_index, missing)
                    waiting[name] = self._hosts[name].call("load", self._shelf.order(layer_index, missing))
            for name, wait in waiting.items():
                wait()
                loaded[name] += self._problem.expert_bytes * len(lacking[name][layer_index])
                self._on_progress(name, loaded[name], totals[name])

    def _announce(self, plan: DispatchPlan) -> None:
        """Tell all hosts of a plan to follow it, and to tell other dispatchers."""
        names = self._names(plan.placement)
        directory = Directory(plan.epoch, plan.placement, tuple(self._addresses[name] for name in names))
        for wait in [self._hosts[name].call("follow", directory) for name in names]:
            wait()

    def _leave(self, placement: Placement, epoch: int) -> None:
        """Drop what a placement does not need: old plans, experts, hosts."""
        layers = range(placement.num_layers)
        for layer_index in layers:
            self._home.keep_only(layer_index, placement.expert_ids_on(HOME, layer_index))
        names = self._names(placement)
        waiting = []
        for name in list(self._hosts):
            if name in names:
                index = placement.device_names.index(name)
                kept = {layer_index: placement.expert_ids_on(index, layer_index) for layer_index in layers}
                waiting.append((name, self._hosts[name].call("leave_before", epoch, kept)))
            else:
                self._end(name)
        for name, wait in waiting:
            try:
                wait()
            except HostDownError as error:
                logger.warning("host %s could not be told to tidy up (%s)", name, error)

    def _end(self, name: str) -> None:
        self._hosts.pop(name).kill()
        address = self._addresses.pop(name, None)
        if address is not None:
            remove_socket_folder(address, machine_id())

    # --- Recovery

    def _recover(self, dispatcher: Dispatcher, down: list[str]) -> None:
        """Make experts reachable whose hosts do not answer: wait for a live host, else place them elsewhere."""
        with self._lock:
            if not down:  # another thread has just put a new plan in force
                return
            down = [name for name in down if name in self._hosts]
            lost = [name for name in down if not self._hosts[name].is_alive(_ALIVE_TIMEOUT_S)]
            if not lost:
                self._wait_for(down)
                return
            logger.warning("devices %s are lost; their experts are loaded elsewhere", ", ".join(lost))
            for name in lost:
                self._end(name)
            try:
                placement = evacuate(self._problem, self.placement, lost)
            except PlacementError as error:
                logger.warning("%s Starting hosts on %s again.", error, ", ".join(lost))
                placement = self.placement
            self.rebalance(placement)

    def _wait_for(self, names: list[str]) -> None:
        """Wait until one of some hosts, whose processes live, answers again."""
        deadline_s = time.monotonic() + self._config.connect_timeout_s
        while not self._any_is_up(names):
            if time.monotonic() > deadline_s:
                raise HostDownError(
                    f"hosts {', '.join(names)} run, but did not answer for {self._config.connect_timeout_s} s. "
                    f"Look at the network between the machines, or raise connect_timeout_s."
                )
            time.sleep(0.01)

    def _any_is_up(self, names: Sequence[str]) -> bool:
        with self._dispatcher.paused():
            return any(self._links.is_up(name) for name in names)


def _experts_of(block: Any) -> GroupedExperts:
    assert isinstance(block, Block)
    experts = block.moe.experts
    if not isinstance(experts, GroupedExperts):
        raise ClusterError("start_expert_hosts: the experts of this model run elsewhere already. Load the model again.")
    return experts


def _lacking(wanted: Sequence[int], held: Sequence[int]) -> list[int]:
    return sorted(set(wanted) - set(held))
