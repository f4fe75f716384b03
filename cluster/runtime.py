"""The life of a cluster: connect to Ray, start the expert hosts of a placement, shut down.

``connect`` yields a session; ``start_expert_hosts`` yields executors to hand to
``model.replace_experts``. Both are context managers and leave no actor, and no
Ray that they started, behind.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from cluster.config import ClusterConfig
from cluster.expert_cluster import ExpertCluster
from cluster.expert_source import CheckpointSource
from cluster.host_fleet import OnProgress
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from moe_bitnet.errors import ClusterError, ConfigError, PlacementError
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)


@contextmanager
def connect(config: ClusterConfig | None = None) -> Iterator[None]:
    """Use a Ray that is connected already, else the one at ``config.address``, else start a local one.

    A Ray that was connected here is disconnected at the end, and shut down if it was started here.

    Raises:
        ClusterError: the address does not answer, or is not a Ray cluster of this version.
    """
    config = config or ClusterConfig()
    if ray.is_initialized():
        yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a local Ray's default of 15 starves hosts and training beside any other process
    os.environ.setdefault("RAY_worker_niceness", "0")
    # says at every start that authentication is on, which is what we want
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if config.address is None:
        try:
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ClusterError(f"Ray cannot be started here ({error}). Look at its logs below /tmp/ray.") from error
    else:
        _check_address(config.address, config.connect_timeout_s)
        try:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ClusterError(
                f"Ray at {config.address} answers but cannot be used ({error}). "
                f"Check that it is a Ray head of version {ray.__version__}, or leave the address out to start one here."
            ) from error
    try:
        if on_terminate is not None and threading.current_thread() is threading.main_thread():
            # Ray puts its own handler in the place of the caller's, which ends the process without shutting down
            signal.signal(signal.SIGTERM, on_terminate)
        yield
    finally:
        ray.shutdown()


@contextmanager
def start_expert_hosts(
    model: MoETransformer,
    problem: PlacementProblem,
    placement: Placement,
    config: ClusterConfig | None = None,
    checkpoint: Path | str | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[ExpertCluster]:
    """Start one Ray actor for each device of a placement but the home, and load its experts.

    Args:
        model: on the CPU, with its experts in place; those at home stay in this process.
        problem: what was placed; gives the memory of each device.
        placement: devices of every expert.
        config: row formats and time-outs.
        checkpoint: folder of this model from which the hosts read their experts; the path must mean the same on
            every machine. Without it experts travel through Ray's object store.
        on_progress: called with a device's name, and the bytes of experts loaded so far and in all.
    Yields:
        the running hosts, with one executor for each MoE layer for ``model.replace_experts``; they end with the block.
    Raises:
        PlacementError: the placement does not fit the devices, or is one of another model.
        ConfigError: the experts do not take rows in the format ``config.dispatch``.
        ClusterError: Ray is not connected, the model's experts are elsewhere, a device is a GPU, or a host does not
            start in time.
        CheckpointError: the checkpoint is none.
    """
    config = config or ClusterConfig()
    placement.check(problem)
    _check_model(model, placement, config)
    _check_devices(problem, placement)
    source = None if checkpoint is None else CheckpointSource.of(checkpoint)
    if not ray.is_initialized():  # else Ray would start a cluster of its own accord
        raise ClusterError("start_expert_hosts: Ray is not connected. Call it inside 'with connect(...)'.")
    hosts = ExpertCluster(model, problem, placement, config, source, on_progress)
    try:
        yield hosts
    finally:
        hosts.close()


def _check_devices(problem: PlacementProblem, placement: Placement) -> None:
    """Refuse GPUs: experts would be computed, and held, beside them."""
    gpus = [
        each.name for each in problem.topology.devices if each.kind == "cuda" and each.name in placement.device_names
    ]
    if gpus:
        raise ClusterError(
            f"start_expert_hosts: {', '.join(gpus)} {'is a GPU' if len(gpus) == 1 else 'are GPUs'}, and expert hosts "
            f"compute on CPUs in this release. Place the experts on devices of kind 'cpu'."
        )


def _check_model(model: MoETransformer, placement: Placement, config: ClusterConfig) -> None:
    if (placement.num_layers, placement.num_experts) != (model.config.num_layers, model.config.num_experts):
        raise PlacementError(
            f"the placement has {placement.num_layers} layers of {placement.num_experts} experts, the model "
            f"{model.config.num_layers} of {model.config.num_experts}. Solve the placement for this model."
        )
    if config.dispatch == "int8" and not model.config.is_packable:
        raise ConfigError(
            "dispatch is 'int8', but the experts of this model are float and take no int8 rows. "
            "Set dispatch to 'float32' (exact) or 'float16'."
        )


def _check_address(address: str, timeout_s: float) -> None:
    """Find out in time whether a Ray head answers at ``address``; Ray itself goes on trying for minutes.

    The check runs in a process of its own, because Ray's client cannot be interrupted.
    """
    if address == "auto":
        return
    deadline = time.monotonic() + timeout_s
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ClusterError(f"Ray address {address!r} is not host:port, such as 10.0.0.1:6379.")
    advice = "Start one with 'ray start --head', check host and port, or leave the address out to start one here."
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: the host cannot be a name
        raise ClusterError(f"no Ray cluster answers at {address} ({error}). {advice}") from error
    if address.startswith("ray://"):
        return  # the client protocol has its own time-out
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ClusterError(
            f"something listens at {address}, but it did not prove to be a healthy Ray head within {timeout_s} s. "
            f"{advice}"
        ) from error
