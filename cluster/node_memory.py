"""What memory this host can give, measured here: free RAM, and free memory of each GPU.

Runs on every node of a cluster, in a process that :mod:`cluster.discovery` starts there; knows nothing of Ray.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class NodeMemory:
    """Free memory of one host.

    Attributes:
        machine_id: equal for processes that share one RAM, whatever containers or namespaces they are in.
        ram_bytes: what processes can take before the host swaps (``MemAvailable``).
        gpu_bytes: of each GPU that this process sees, by its CUDA index; free beside a CUDA context of this process.
    """

    machine_id: str
    ram_bytes: int
    gpu_bytes: tuple[int, ...]


def measure_memory(max_gpus: int = 0) -> NodeMemory:
    """Measure the memory that is free now.

    Args:
        max_gpus: look at this many GPUs at most; with 0, CUDA is not started.
    """
    gpu_bytes = []
    if max_gpus and torch.cuda.is_available():
        for index in range(min(max_gpus, torch.cuda.device_count())):
            free_bytes, _ = torch.cuda.mem_get_info(index)
            gpu_bytes.append(int(free_bytes))
    return NodeMemory(machine_id(), int(psutil.virtual_memory().available), tuple(gpu_bytes))


def machine_id() -> str:
    """Return what tells this machine from others: the kernel's boot id, or its name where there is none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()
