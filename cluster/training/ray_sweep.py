"""Run the cells of a sweep as Ray tasks, as many at a time as Ray has CPUs."""

import logging
from collections.abc import Callable, Sequence

import ray
import ray.exceptions

from cluster.config import ClusterConfig
from cluster.runtime import connect
from cluster.training.allocator import KEEP_FREED_MEMORY
from cluster.training.stopping import request_stop, withdraw_stop
from cluster.training.sweep import CellResult, SweepCell, check_cell, finished, run_cell
from moe_bitnet.errors import ClusterError

logger = logging.getLogger(__name__)

OnResult = Callable[[SweepCell, CellResult], None]

_MAX_RESTARTS = 3
_STOP_TIMEOUT_S = 180.0


def run_sweep(
    cells: Sequence[SweepCell],
    cluster_config: ClusterConfig | None = None,
    cpus_per_cell: int = 1,
    on_result: OnResult | None = None,
) -> list[CellResult]:
    """Train the cells that are not finished; a process that dies is started again and resumes from its checkpoint.

    Ctrl-C lets running cells write a checkpoint; the same call goes on from there.

    Args:
        cells: all of them; their folders must be seen by every host.
        cluster_config: how to reach Ray.
        cpus_per_cell: CPUs, and threads, of a cell.
        on_result: called with each cell that ends, those that are finished already first.
    Returns:
        the results, in the order of the cells.
    Raises:
        ConfigError: a cell's folder holds a run with other settings.
        ClusterError: Ray does not answer, or has too few CPUs for one cell.
        KeyboardInterrupt: Ctrl-C.
    """
    for cell in cells:
        check_cell(cell)
        withdraw_stop(cell.folder)
    results = {cell.name: result for cell in cells if (result := finished(cell)) is not None}
    tell = on_result or _ignore
    for cell in cells:
        if cell.name in results:
            tell(cell, results[cell.name])
    waiting = [cell for cell in cells if cell.name not in results]
    if waiting:
        with connect(cluster_config):
            _check_cpus(cpus_per_cell)
            results.update(_run(waiting, cpus_per_cell, tell))
    return [results[cell.name] for cell in cells]


def _run(cells: Sequence[SweepCell], cpus_per_cell: int, tell: OnResult) -> dict[str, CellResult]:
    environment = {"OMP_NUM_THREADS": str(cpus_per_cell), **KEEP_FREED_MEMORY}
    task = ray.remote(num_cpus=cpus_per_cell, max_retries=_MAX_RESTARTS, runtime_env={"env_vars": environment})(
        run_cell
    )
    running = {task.remote(cell, cpus_per_cell): cell for cell in cells}
    results: dict[str, CellResult] = {}
    try:
        while running:
            for ref in ray.wait(list(running), timeout=0.5)[0]:
                cell = running.pop(ref)
                results[cell.name] = _result_of(ref)
                tell(cell, results[cell.name])
    except KeyboardInterrupt:
        logger.warning("stopping after the steps that run, with checkpoints; interrupt once more to stop at once")
        for cell in running.values():
            request_stop(cell.folder)
        ray.wait(list(running), num_returns=len(running), timeout=_STOP_TIMEOUT_S)
        raise
    return results


def _result_of(ref: "ray.ObjectRef[CellResult]") -> CellResult:
    try:
        result: CellResult = ray.get(ref)
    except ray.exceptions.RayTaskError:
        raise  # a bug
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        return CellResult(error=f"its process died, after {_MAX_RESTARTS} restarts ({reason})")
    return result


def _check_cpus(cpus_per_cell: int) -> None:
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if largest < cpus_per_cell:
        raise ClusterError(
            f"A cell needs {cpus_per_cell} CPUs on one host, and Ray's largest host has {largest:g}. "
            f"Give fewer CPUs a cell."
        )


def _ignore(cell: SweepCell, result: CellResult) -> None:
    """Nobody wants to know."""
