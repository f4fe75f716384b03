"""The placement of one layer as numbers: what the searches take, and the cost that they minimise.

    cost of a placement = sum over tokens and visited devices of visit_costs[device]       traffic
                        + sum over experts of expert_costs[expert, device of the expert]   moving, if it costs
                        + OVERLOAD_COST · sum over devices of max(0, load - load_cap)      balance before traffic

A token visits a device once, however many of its experts are there: its experts are a hyperedge, and the
traffic is the connectivity metric of hypergraph partitioning (Çatalyürek and Aykanat 1999). The home,
device 0, is visited for nothing. Every term is a sum over devices of something that depends on that
device's set of experts alone; the exact search lives on that.
"""

from dataclasses import dataclass

import numpy as np

from cluster.placement.arrays import FloatArray, IntArray

OVERLOAD_COST = 100.0
"""For one (token, expert) pair above the cap, in dearest visits: more than moving a pair away can cost."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Experts of one layer, to be put on devices.

    Attributes:
        expert_indices: ``[num_tokens, top_k]`` sample of the routing, all different within a row.
        expert_loads: ``[num_experts]`` (token, expert) pairs, on the scale of the sample.
        max_counts: ``[num_devices]`` experts that a device can hold; they suffice for all.
        visit_costs: ``[num_devices]`` cost of one token's visit, 0 for the home.
        load_cap: load that no device should exceed, on the scale of the sample.
        expert_costs: ``[num_experts, num_devices]`` cost of an expert's being on a device.
    """

    expert_indices: IntArray
    expert_loads: FloatArray
    max_counts: IntArray
    visit_costs: FloatArray
    load_cap: float
    expert_costs: FloatArray

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_loads)

    @property
    def num_devices(self) -> int:
        """D, the home included."""
        return len(self.max_counts)

    @property
    def overload_cost(self) -> float:
        """Cost of one pair above the cap."""
        return OVERLOAD_COST * max(1.0, float(self.visit_costs.max()))


def layer_cost(problem: LayerProblem, device_of_expert: IntArray) -> float:
    """Return the cost of a placement, counted from the definition.

    Args:
        problem: the layer.
        device_of_expert: ``[num_experts]`` device indices.
    """
    visits = np.bincount(_visited_pairs(problem, device_of_expert) % problem.num_devices, minlength=problem.num_devices)
    loads = np.bincount(device_of_expert, weights=problem.expert_loads, minlength=problem.num_devices)
    overload = np.maximum(0.0, loads - problem.load_cap).sum()
    moving = problem.expert_costs[np.arange(problem.num_experts), device_of_expert].sum()
    return float(visits @ problem.visit_costs + moving + problem.overload_cost * overload)


def _visited_pairs(problem: LayerProblem, device_of_expert: IntArray) -> IntArray:
    """Return each (token, device) pair once, as ``token · D + device``."""
    devices = device_of_expert[problem.expert_indices]  # [T, K]
    tokens = np.arange(len(devices))[:, None]
    return np.unique(tokens * problem.num_devices + devices)
