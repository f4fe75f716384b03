"""What memory this host can give, measured here: free RAM, and free memory of each GPU.

Runs on every node of a cluster, in a process that :mod:`cluster.discovery` starts there; knows nothing of Ray.
"""

from dataclasses import dataclass

import psutil
import torch

from cluster.machine import boot_id


@dataclass(frozen=True)
class NodeMemory:
    """Free memory of one host.

    Attributes:
        boot_id: equal for processes that share one RAM (:func:`cluster.machine.boot_id`).
        ram_bytes: what processes can take before the host swaps (``MemAvailable``).
        gpu_bytes: of each GPU that this process sees, by its CUDA index; free beside a CUDA context of this process.
    """

    boot_id: str
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
    return NodeMemory(boot_id(), int(psutil.virtual_memory().available), tuple(gpu_bytes))
