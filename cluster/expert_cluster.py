"""The life of expert hosts: start, health, another placement while generating, recovery of lost experts, end.

A change of placement never stops the work: the new plan's experts are loaded beside the old ones, hosts are told to
follow both, the dispatcher switches between two layers, and only then does what is no longer needed go.
"""

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from cluster.actors import RayHost
from cluster.config import ClusterConfig
from cluster.dispatch_batch import RowRules
from cluster.expert_source import CheckpointSource
from cluster.expert_store import ExpertStore, local_experts, slice_experts
from cluster.host_fleet import HostFleet, OnProgress, room_for_experts
from cluster.joining import Invitation
from cluster.machine import machine_id
from cluster.placement.evacuation import evacuate
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.rebalance import Rebalance, rebalance_placement
from cluster.placement.replica_choice import HOME
from cluster.ray_metrics import MetricsPublisher
from cluster.remote_experts import Dispatcher, DispatchPlan, RemoteExperts
from cluster.routing.trace import RoutingTrace
from cluster.shelf import Shelf
from cluster.topology import Topology
from cluster.transport.header import FrameLimits
from cluster.transport.links import BulkPath, HostLinks, LinkTimes
from cluster.transport.meter import TrafficMeter
from cluster.transport.sockets import KeyPair
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.errors import ClusterError, HostDownError, MoEBitNetError, PlacementError
from moe_bitnet.experts import GroupedExperts
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)

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
        self._problem, self._config = problem, config
        self._on_progress = on_progress or (lambda name, loaded, total: None)
        self._lock = threading.RLock()  # one change of plan at a time
        self._epochs = itertools.count(1)
        layers, layout = local_experts(model), model_layout(model)
        keys = KeyPair.generate()
        self._shelf = Shelf(checkpoint)
        self._fleet = HostFleet(model.config, layout, config, keys.public, self._shelf, self._on_progress)
        self.meter = TrafficMeter()
        room = room_for_experts(problem, placement, HOME)
        self._home = ExpertStore(placement.device_names[HOME], room, model.config, layout)
        self._links = HostLinks(
            machine_id(), keys, FrameLimits(max_hidden_size=model.config.hidden_size), LinkTimes.of(config)
        )
        plan = DispatchPlan.of(placement)
        self._dispatcher = Dispatcher(plan, self._links, self._home, self.meter, RowRules.of(config), self._recover)
        self._metrics = MetricsPublisher(self.meter)
        try:
            self._fill_home(placement, layers)
            self._fleet.bring(problem, placement, plan.epoch, layers)
            self._dispatcher.follow(plan, self._fleet.addresses(placement))
            for name in self._fleet.hosts:
                self._links.probe(name)  # warm up: connected, and the handshake done
            self._open_bulk()
            self._fleet.announce(plan.epoch, placement)
        except BaseException:
            self.close()
            raise
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
            directory = self._fleet.directory(self.epoch, self.placement)
            return Invitation(directory, self._home.usable_bytes, self._config)

    @property
    def hosts(self) -> Mapping[str, RayHost]:
        """The hosts by their device's name; the home has none."""
        return self._fleet.hosts

    def health(self) -> list[HostHealth]:
        """Ask every host whether it is there, and what it holds."""
        states = [HostHealth(self._home.device_name, True, self._home.held_bytes, 0.0)]
        for name, host in self._fleet.hosts.items():
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
            plan = DispatchPlan.of(placement, next(self._epochs))
            try:
                self._shelve(placement)
                self._fill_home(placement)
                self._fleet.bring(problem, placement, plan.epoch)
                self._fleet.announce(plan.epoch, placement)
            except MoEBitNetError:
                self._problem = old_problem
                self._leave(self.epoch, old)
                raise
            self._dispatcher.follow(plan, self._fleet.addresses(placement))
            self._open_bulk()
            self._leave(plan.epoch, placement)
            logger.info("plan %d is in force on %d devices", plan.epoch, placement.num_devices)

    def scale(
        self, topology: Topology, *, num_devices: int | None = None, trace: RoutingTrace | None = None
    ) -> Rebalance:
        """Use more, fewer or other devices while the model goes on, with few moves.

        Args:
            topology: the devices that may be used from now on, the home among them.
            num_devices: devices to use; ``None`` for those in use that are left, and as many more as memory needs.
            trace: recent routing, by which experts go together.
        Returns:
            the new placement, which is in force, and what moved.
        Raises:
            PlacementError: the experts do not fit; all stays as it was.
            ClusterError: a host cannot be started or does not answer; all stays as it was.
        """
        with self._lock:
            problem = dataclasses.replace(self._problem, topology=topology)
            result = rebalance_placement(problem, self.placement, trace=trace, num_devices=num_devices)
            self.rebalance(result.placement, problem)
            return result

    def close(self) -> None:
        """End all hosts and connections."""
        with self._dispatcher.paused():
            self._links.close()
        self._fleet.close()
        self._metrics.close()

    # --- Steps of a change

    def _shelve(self, placement: Placement) -> None:
        """Keep experts that leave the home where hosts can fetch them."""
        for layer_index in range(placement.num_layers):
            held = set(self._home.expert_ids(layer_index))
            away = {
                expert_id
                for index in range(1, placement.num_devices)
                for expert_id in placement.expert_ids_on(index, layer_index)
            }
            part = self._home.slice(layer_index, self._shelf.lacks(layer_index, sorted(held & away)))
            if part is not None:
                self._shelf.put_slice(part)

    def _fill_home(self, placement: Placement, layers: Sequence[GroupedExperts] = ()) -> None:
        """Load what the home lacks: from the model's layers at the start, later from the shelf."""
        self._home.usable_bytes = room_for_experts(self._problem, placement, HOME)
        for layer_index, wanted in placement.experts_on(HOME).items():
            missing = self._home.lacks(layer_index, wanted)
            if missing and layers:
                self._home.load(slice_experts(layers[layer_index], layer_index, missing))
            elif missing:
                self._home.load(self._shelf.order(layer_index, missing).fetch())
        self._on_progress(self._home.device_name, self._home.held_bytes, self._home.held_bytes)

    def _leave(self, epoch: int, placement: Placement) -> None:
        """Drop what a placement does not need, at home and on hosts."""
        self._home.keep(placement.experts_on(HOME))
        self._fleet.leave(epoch, placement)

    def _open_bulk(self) -> None:
        """Open bulk channels to hosts on other machines that have none, if they are asked for."""
        min_bytes, timeout_s = self._config.bulk_min_bytes, self._config.request_timeout_s
        if min_bytes is None:
            return
        for name, host in self._fleet.hosts.items():
            with self._dispatcher.paused():
                if not self._links.is_encrypted(name) or self._links.has_bulk(name):
                    continue
                try:
                    channel, channel_id = host.open_bulk(ray.util.get_node_ip_address(), timeout_s)
                except HostDownError as error:
                    logger.warning("host %s gets large frames by its encrypted socket: %s", name, error)
                else:
                    self._links.use_bulk(name, BulkPath(channel, channel_id, min_bytes))

    # --- Recovery

    def _recover(self, dispatcher: Dispatcher, down: list[str]) -> None:
        """Make experts reachable whose hosts do not answer: wait for a live host, else place them elsewhere."""
        with self._lock:
            hosts = self._fleet.hosts
            down = [name for name in down if name in hosts]
            if not down:  # another thread has just put a new plan in force
                return
            lost = [name for name in down if not hosts[name].is_alive(_ALIVE_TIMEOUT_S)]
            if not lost:
                self._wait_for(down)
                return
            logger.warning("devices %s are lost; their experts are loaded elsewhere", ", ".join(lost))
            for name in lost:
                self._fleet.end(name)
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
