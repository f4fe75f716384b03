"""Ternary experts on a Ray cluster: placement, expert hosts, training.

The names below are the public interface. They are imported when first used, so
that planning a placement or reading token shards does not load Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.placement.solver import solve_placement
    from cluster.runtime import connect
    from cluster.training.ray_trainer import train

__all__ = ["ClusterConfig", "connect", "solve_placement", "train"]

_MODULE_OF_NAME = {
    "ClusterConfig": "cluster.config",
    "connect": "cluster.runtime",
    "solve_placement": "cluster.placement.solver",
    "train": "cluster.training.ray_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF_NAME[name]), name)
