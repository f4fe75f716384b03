"""Expert hosts without Ray: a process each, with a network of its own where that is permitted.

    python -m benchmarks.expert_processes KEY    started by :func:`expert_hosts`; the holder of public KEY may connect

Every host holds all experts of one MoE layer, so that any placement can be tried on the same processes: a dispatcher
asks each for the experts of its plan alone.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.network import VirtualLinks, command_in_namespace
from benchmarks.synthetic import build_packed_model
from cluster.expert_host import ExpertHost
from cluster.expert_store import ExpertStore, slice_experts
from cluster.machine import machine_id
from cluster.transport.server import FrameServer
from cluster.transport.sockets import HostAddress
from moe_bitnet.config import ModelConfig
from moe_bitnet.experts import PackedExperts
from moe_bitnet.model import Block
from moe_bitnet.packing import Layout

LAYER = ModelConfig(
    vocab_size=64,
    hidden_size=2048,
    intermediate_size=64,  # small, so that moving rows is not lost in computing them
    num_layers=1,
    num_heads=16,
    num_kv_heads=16,
    num_experts=64,
    top_k=8,
)
"""Rows, experts and choices of OLMoE-1B-7B (arXiv:2409.02060)."""

HEARTBEAT_S = 60.0
"""Of both ends: so long that no sign of life is among the bytes that are counted."""

LOCALHOST = "127.0.0.1"
_LAYOUT: Layout = "2bit"
_ROOM_BYTES = 2**33


@dataclass(frozen=True)
class Hosts:
    """Running hosts.

    Attributes:
        addresses: of all, with the device names that were asked for.
        process_ids: in the same order.
        links: to their networks; ``None`` if they share this process's.
    """

    addresses: tuple[HostAddress, ...]
    process_ids: tuple[int, ...]
    links: VirtualLinks | None


def full_store(device_name: str) -> ExpertStore:
    """Return a store with all experts of :data:`LAYER`, the same in every process."""
    model = build_packed_model(LAYER, _LAYOUT)
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.moe.experts, PackedExperts)
    store = ExpertStore(device_name, _ROOM_BYTES, LAYER, _LAYOUT)
    store.load(slice_experts(block.moe.experts, 0, range(LAYER.num_experts)))
    return store


@contextmanager
def expert_hosts(device_names: Sequence[str], public_key: str, *, has_networks: bool) -> Iterator[Hosts]:
    """Start a process for each device; all end with the block.

    Args:
        device_names: of the hosts.
        public_key: of who may connect.
        has_networks: give each a network of its own; this process must have one (:mod:`benchmarks.network`).
    """
    command = [sys.executable, "-m", __name__, public_key]
    links = VirtualLinks() if has_networks else None
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in device_names:
            full = command_in_namespace(command) if has_networks else command
            processes.append(subprocess.Popen(full, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        addresses = []
        for name, process in zip(device_names, processes, strict=True):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()  # it is there, and so is its network
            ip = links.connect(process.pid) if links is not None else LOCALHOST
            print(ip, file=process.stdin, flush=True)
            addresses.append(replace(HostAddress(**json.loads(process.stdout.readline())), device_name=name))
        yield Hosts(tuple(addresses), tuple(process.pid for process in processes), links)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait()


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    host = ExpertHost(full_store("host"))
    print("ready", flush=True)
    ip = sys.stdin.readline().strip()
    with FrameServer("host", host.answer, host.limits.max_frame_bytes, ip, machine_id(), HEARTBEAT_S) as server:
        server.allow(sys.argv[1])
        print(json.dumps(asdict(server.address)), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
