"""The expert hosts of one model: started, loaded, told of plans and ended, to suit a placement.

What is asked of several hosts is asked of all before the first answer is awaited. Rows are none of its business.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import ray

from cluster.actors import HostSettings, RayHost
from cluster.config import ClusterConfig
from cluster.directory import Directory
from cluster.machine import machine_id
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.replica_choice import HOME
from cluster.shelf import Shelf
from cluster.transport.sockets import HostAddress, remove_socket_folder
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ClusterError, HostDownError, MoEBitNetError
from moe_bitnet.experts import GroupedExperts
from moe_bitnet.packing import Layout

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with a device's name, and the bytes of experts loaded so far and in all."""

_STOP_TIMEOUT_S = 1.0


class HostFleet:
    """Hosts by the names of their devices.

    Args:
        model_config: shape and recipe of the model.
        layout: how experts are packed; ``None`` for float experts.
        config: time-outs.
        public_key: of the dispatcher, for hosts on other machines.
        shelf: from which hosts load experts.
        on_progress: called while they load.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        layout: Layout | None,
        config: ClusterConfig,
        public_key: str,
        shelf: Shelf,
        on_progress: OnProgress,
    ) -> None:
        self._model_config, self._layout, self._config = model_config, layout, config
        self._public_key, self._shelf, self._on_progress = public_key, shelf, on_progress
        self._hosts: dict[str, RayHost] = {}
        self._addresses: dict[str, HostAddress] = {}

    @property
    def hosts(self) -> Mapping[str, RayHost]:
        """All hosts that were started and not ended."""
        return dict(self._hosts)

    def addresses(self, placement: Placement) -> tuple[HostAddress, ...]:
        """Return where the hosts of a placement listen."""
        return tuple(self._addresses[name] for name in hosted_devices(placement))

    def bring(
        self, problem: PlacementProblem, placement: Placement, epoch: int, layers: Sequence[GroupedExperts] = ()
    ) -> None:
        """Start the hosts that a placement needs, and load what they lack beside what they have.

        Args:
            problem: gives the memory and the node of each device.
            placement: devices of every expert.
            epoch: number of the plan that new hosts follow.
            layers: the experts of each layer, to put on the shelf; empty once they are there.
        Raises:
            PlacementError: a host's memory does not take its experts.
            ClusterError: a host cannot be started, or does not answer.
        """
        names = hosted_devices(placement)
        for name in names:
            if name not in self._hosts:
                self._hosts[name] = self._start(problem, placement, name, epoch)
        waiting = {name: self._hosts[name].call("address") for name in names if name not in self._addresses}
        for name, wait in waiting.items():
            self._addresses[name] = wait()
        self._load(problem, placement, self._lacking(placement), layers)

    def directory(self, epoch: int, placement: Placement) -> Directory:
        """Return what guests need to follow a plan."""
        actors = {name: self._hosts[name].actor for name in hosted_devices(placement)}
        return Directory(epoch, placement, self.addresses(placement), actors)

    def announce(self, epoch: int, placement: Placement) -> None:
        """Tell the hosts of a placement to follow its plan too, and to tell dispatchers that ask."""
        directory = self.directory(epoch, placement)
        for wait in [self._hosts[name].call("follow", directory) for name in hosted_devices(placement)]:
            wait()

    def leave(self, epoch: int, placement: Placement) -> None:
        """Drop what a placement does not need: plans before ``epoch``, experts, hosts."""
        names, waiting = hosted_devices(placement), []
        for name in list(self._hosts):
            if name in names:
                kept = placement.experts_on(placement.device_names.index(name))
                waiting.append((name, self._hosts[name].call("leave_before", epoch, kept)))
            else:
                self.end(name)
        for name, wait in waiting:
            try:
                wait()
            except HostDownError as error:  # found again, and dealt with, when rows are sent there
                logger.warning("host %s could not be told to tidy up (%s)", name, error)

    def end(self, name: str) -> None:
        """End one host at once."""
        self._hosts.pop(name).kill()
        address = self._addresses.pop(name, None)
        if address is not None:  # a killed host cannot do it itself
            remove_socket_folder(address, machine_id())

    def close(self) -> None:
        """End all hosts; those that can close their sockets themselves."""
        for host in self._hosts.values():
            try:
                RayHost(host.actor, host.device_name, _STOP_TIMEOUT_S).call("stop")()
            except MoEBitNetError as error:
                logger.info("host %s did not stop by itself (%s)", host.device_name, error)
        for name in list(self._hosts):
            self.end(name)

    def _start(self, problem: PlacementProblem, placement: Placement, name: str, epoch: int) -> RayHost:
        node_id = problem.topology.device(name).node_id
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        if node_id is not None and node_id not in nodes:  # Ray would wait for it without a word
            raise ClusterError(
                f"device {name!r} is on node {node_id}, which is none of the {len(nodes)} nodes of this Ray "
                f"cluster that are alive. Discover the topology again, or leave the device out."
            )
        settings = HostSettings(
            name,
            room_for_experts(problem, placement, placement.device_names.index(name)),
            self._model_config,
            self._layout,
            epoch,
            self._config.heartbeat_s,
            listens_to_network=len(nodes) > 1,
            allowed_keys=(self._public_key,),
            num_sharers=_num_sharers(problem, placement, node_id),
        )
        return RayHost.start(settings, self._config.connect_timeout_s, node_id)

    def _lacking(self, placement: Placement) -> dict[str, list[list[int]]]:
        """Return the experts that each host lacks, by device and layer."""
        held = {name: self._hosts[name].call("expert_ids") for name in hosted_devices(placement)}
        lacking = {}
        for name, wait in held.items():
            here, wanted = wait(), placement.experts_on(placement.device_names.index(name))
            lacking[name] = [sorted(set(ids) - set(here.get(layer, ()))) for layer, ids in wanted.items()]
        return lacking

    def _load(
        self,
        problem: PlacementProblem,
        placement: Placement,
        lacking: Mapping[str, list[list[int]]],
        layers: Sequence[GroupedExperts],
    ) -> None:
        """Load layer by layer, all hosts at once, and say how far it is."""
        totals = {name: problem.expert_bytes * sum(map(len, missing)) for name, missing in lacking.items()}
        loaded = dict.fromkeys(lacking, 0)
        for layer_index in range(placement.num_layers):
            waiting = {}
            for name, by_layer in lacking.items():
                missing = by_layer[layer_index]
                if missing:
                    if layers:
                        self._shelf.put(layers[layer_index], layer_index, missing)
                    waiting[name] = self._hosts[name].call("load", self._shelf.order(layer_index, missing))
            for name, wait in waiting.items():
                wait()
                loaded[name] += problem.expert_bytes * len(lacking[name][layer_index])
                self._on_progress(name, loaded[name], totals[name])


def hosted_devices(placement: Placement) -> list[str]:
    """Return the devices of a placement that need a host: all with experts, except the home."""
    return [
        name
        for index, name in enumerate(placement.device_names)
        if index != HOME and any(placement.experts_on(index).values())
    ]


def room_for_experts(problem: PlacementProblem, placement: Placement, device_index: int) -> int:
    """Return the bytes that experts may fill on a device of a placement."""
    device = problem.topology.device(placement.device_names[device_index])
    return device.usable_bytes - (problem.home_bytes if device_index == HOME else 0)


def _num_sharers(problem: PlacementProblem, placement: Placement, node_id: str | None) -> int:
    """Count the processes that share a node's cores: its hosts, and this one if it is there."""
    num_hosts = sum(problem.topology.device(name).node_id == node_id for name in hosted_devices(placement))
    return num_hosts + (node_id in (None, ray.get_runtime_context().get_node_id()))
