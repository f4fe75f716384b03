"""Another process that sends rows to hosts which somebody else owns: a second copy of the model, say.

The owner writes an invitation, which travels through Ray; who joins gets executors of its own. The owner alone changes
plans: a joined dispatcher learns of a new one when a host refuses the old, and asks that host for it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.actors import RayHost
from cluster.config import ClusterConfig
from cluster.directory import Directory
from cluster.expert_store import ExpertStore, slice_experts
from cluster.machine import machine_id
from cluster.placement.placement import Placement
from cluster.remote_experts import HOME, Dispatcher, DispatchPlan, RemoteExperts, RowRules
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.meter import TrafficMeter
from cluster.transport.sockets import KeyPair
from moe_bitnet.checkpoint.pack import model_layout, require_local_experts
from moe_bitnet.errors import ClusterError, HostDownError
from moe_bitnet.experts import GroupedExperts
from moe_bitnet.model import Block, MoETransformer


@dataclass(frozen=True)
class Invitation:
    """What a process of the same Ray cluster needs to use running hosts.

    Attributes:
        directory: the plan in force when it was written.
        actors: of the hosts, by device name.
        usable_home_bytes: what experts may fill at home.
        config: row formats and time-outs.
    """

    directory: Directory
    actors: Mapping[str, Any]
    usable_home_bytes: int
    config: ClusterConfig


@dataclass(frozen=True)
class JoinedExperts:
    """Executors on hosts that another process owns.

    Attributes:
        executors: one for each MoE layer, for ``model.replace_experts``.
        meter: bytes that they send and receive.
    """

    executors: list[RemoteExperts]
    meter: TrafficMeter


@contextmanager
def join_expert_hosts(model: MoETransformer, invitation: Invitation) -> Iterator[JoinedExperts]:
    """Use running hosts from this process; they stay when the block ends.

    Args:
        model: the same as the owner's, on the CPU, with its experts in place. They stay in memory behind the
            executors, since a later plan may bring any of them home.
        invitation: from ``ExpertCluster.invitation``.
    Raises:
        ClusterError: a host does not answer, or the model's experts are elsewhere.
    """
    require_local_experts(model)
    guest = _Guest(model, invitation)
    try:
        yield JoinedExperts(guest.executors, guest.meter)
    finally:
        guest.close()


class _Guest:
    """A dispatcher that follows plans of others."""

    def __init__(self, model: MoETransformer, invitation: Invitation) -> None:
        config, self._invitation = invitation.config, invitation
        self._layers = [_experts_of(block) for block in model.blocks]
        keys = KeyPair.generate()
        self._actors = {
            name: RayHost(actor, name, config.connect_timeout_s) for name, actor in invitation.actors.items()
        }
        for wait in [host.call("allow", keys.public) for host in self._actors.values()]:
            wait()
        placement = invitation.directory.placement
        self._home = ExpertStore(
            placement.device_names[HOME], invitation.usable_home_bytes, model.config, model_layout(model)
        )
        self._links = HostLinks(
            machine_id(), keys, FrameLimits(max_hidden_size=model.config.hidden_size), LinkTimes.of(config)
        )
        self.meter = TrafficMeter()
        plan = DispatchPlan.of(placement, invitation.directory.epoch)
        self._dispatcher = Dispatcher(plan, self._links, self._home, self.meter, RowRules.of(config), self._recover)
        self._follow(invitation.directory)
        self.executors = [RemoteExperts(index, self._dispatcher) for index in range(placement.num_layers)]

    def close(self) -> None:
        with self._dispatcher.paused():
            self._links.close()

    def _follow(self, directory: Directory) -> None:
        plan = DispatchPlan.of(directory.placement, directory.epoch)
        for layer_index, experts in enumerate(self._layers):
            wanted = directory.placement.expert_ids_on(HOME, layer_index)
            missing = sorted(set(wanted) - set(self._home.expert_ids(layer_index)))
            if missing:
                self._home.load(slice_experts(experts, layer_index, missing))
        self._dispatcher.follow(plan, directory.addresses)
        _keep_home(self._home, directory.placement)

    def _recover(self, dispatcher: Dispatcher, down: list[str]) -> None:
        """Wait until the owner has put another plan in force, or a host that was down answers."""
        deadline_s = time.monotonic() + self._invitation.config.connect_timeout_s
        while time.monotonic() < deadline_s:
            directory = self._newest_directory()
            if directory is not None and directory.epoch > dispatcher.plan.epoch:
                self._follow(directory)
                return
            with dispatcher.paused():
                if any(self._links.is_up(name) for name in down):
                    return
            time.sleep(0.05)
        raise HostDownError(
            f"hosts {', '.join(down)} did not answer, and their owner made no new plan within "
            f"{self._invitation.config.connect_timeout_s} s. Look at the owner, or raise connect_timeout_s."
        )

    def _newest_directory(self) -> Directory | None:
        directories: list[Directory] = []
        for wait in [host.call("directory") for host in self._actors.values()]:
            try:
                directory = wait()
            except HostDownError:
                continue
            if directory is not None:
                directories.append(directory)
        return max(directories, key=lambda each: each.epoch, default=None)


def _keep_home(home: ExpertStore, placement: Placement) -> None:
    for layer_index in range(placement.num_layers):
        home.keep_only(layer_index, placement.expert_ids_on(HOME, layer_index))


def _experts_of(block: Any) -> GroupedExperts:
    assert isinstance(block, Block)
    experts = block.moe.experts
    if not isinstance(experts, GroupedExperts):
        raise ClusterError("join_expert_hosts: the experts of this model run elsewhere already. Load the model again.")
    return experts
