"""Another process that sends rows to hosts which somebody else owns: a second copy of the model, say.

The owner writes an invitation, which travels through Ray; who joins gets executors of its own. The owner alone changes
plans: a joined dispatcher learns of a new one when a host refuses the old, and asks that host for it.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.actors import RayHost
from cluster.config import ClusterConfig
from cluster.directory import Directory
from cluster.dispatch_batch import RowRules
from cluster.expert_store import ExpertStore, local_experts, slice_experts
from cluster.machine import machine_id
from cluster.placement.replica_choice import HOME
from cluster.remote_experts import Dispatcher, DispatchPlan, RemoteExperts
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.meter import TrafficMeter
from cluster.transport.sockets import KeyPair
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.errors import HostDownError
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Invitation:
    """What a process of the same Ray cluster needs to use running hosts.

    Attributes:
        directory: the plan in force when it was written.
        usable_home_bytes: what experts may fill at home.
        config: row formats and time-outs.
    """

    directory: Directory
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
        ClusterError: the model's experts are elsewhere.
    """
    guest = _Guest(model, invitation)
    try:
        yield JoinedExperts(guest.executors, guest.meter)
    finally:
        guest.close()


class _Guest:
    """A dispatcher that follows plans of others."""

    def __init__(self, model: MoETransformer, invitation: Invitation) -> None:
        config, self._invitation = invitation.config, invitation
        self._layers = local_experts(model)
        self._keys = KeyPair.generate()
        self._hosts: list[RayHost] = []
        placement = invitation.directory.placement
        self._home = ExpertStore(
            placement.device_names[HOME], invitation.usable_home_bytes, model.config, model_layout(model)
        )
        self._links = HostLinks(
            machine_id(), self._keys, FrameLimits(max_hidden_size=model.config.hidden_size), LinkTimes.of(config)
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
        """Put a plan in force here; its hosts, some of them new, let this guest in first."""
        timeout_s = self._invitation.config.connect_timeout_s
        self._hosts = [RayHost(actor, name, timeout_s) for name, actor in directory.actors.items()]
        for host, wait in [(host, host.call("allow", self._keys.public)) for host in self._hosts]:
            try:
                wait()
            except HostDownError as error:  # other copies may do; rows that need this host say so
                logger.warning("host %s did not let this process in (%s)", host.device_name, error)
        plan = DispatchPlan.of(directory.placement, directory.epoch)
        wanted = directory.placement.experts_on(HOME)
        for layer_index, expert_ids in wanted.items():
            missing = self._home.lacks(layer_index, expert_ids)
            if missing:
                self._home.load(slice_experts(self._layers[layer_index], layer_index, missing))
        self._dispatcher.follow(plan, directory.addresses)
        self._home.keep(wanted)

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
        for wait in [host.call("directory") for host in self._hosts]:
            try:
                directory = wait()
            except HostDownError:
                continue
            if directory is not None:
                directories.append(directory)
        return max(directories, key=lambda each: each.epoch, default=None)
