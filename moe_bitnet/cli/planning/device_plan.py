"""How many devices a model needs, in one format of its experts and one way of counting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.placement.bound import device_lower_bound
from cluster.placement.cost import expected_bytes_per_token
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import Topology
from cluster.transport.row_format import Combine, RowFormat
from moe_bitnet.cli.planning.device_pool import DevicePool, larger_topology
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.errors import PlacementError

Counted = Literal["experts only", "everything", "own placement"]
"""Expert weights; or shared weights and a key/value cache at home as well; or these as a user placed them."""

MakeProblem = Callable[[Topology], PlacementProblem]

COMBINE = Combine("partial_sums", "float16")
"""What comes home in the predicted traffic: the same for both models, so that the way out is all that differs."""


@dataclass(frozen=True)
class ModelBytes:
    """A model as a placement sees it.

    Attributes:
        weights: format of the experts, one of ``WEIGHT_FORMATS``.
        counted: what the next two are.
        num_layers: layers that hold experts.
        num_experts: routed experts of each.
        expert_bytes: of one expert.
        shared_bytes: of all other weights; 0 where expert weights alone are counted.
        kv_bytes: of the cache; 0 likewise.
    """

    weights: str
    counted: Counted
    num_layers: int
    num_experts: int
    expert_bytes: int
    shared_bytes: int = 0
    kv_bytes: int = 0

    @property
    def all_expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.expert_bytes * self.num_layers * self.num_experts

    def problem(self, topology: Topology) -> PlacementProblem:
        """Return the problem of placing it, with shared weights and cache at home."""
        home_bytes = self.shared_bytes + self.kv_bytes
        return PlacementProblem(self.num_layers, self.num_experts, self.expert_bytes, home_bytes, topology)


@dataclass(frozen=True)
class DevicePlan:
    """A model on devices.

    Attributes:
        model: what is placed.
        num_devices: devices it needs; ``None`` if no number of such devices is enough.
        num_allowed: devices that it may use.
        lower_bound: no placement needs fewer.
        problem: sizes, and the devices to choose from.
        placement: of every expert; ``None`` if it does not fit on the devices given.
        shortfall: why it does not, with the missing bytes; else empty.
    """

    model: ModelBytes
    num_devices: int | None
    num_allowed: int
    lower_bound: int
    problem: PlacementProblem
    placement: Placement | None
    shortfall: str = ""


def plan_devices(model: ModelBytes, pool: DevicePool) -> DevicePlan:
    """Place a model on the fewest devices of a pool; where they are too few, count how many it would take."""
    problem = model.problem(pool.topology)
    bound, allowed = device_lower_bound(problem), pool.max_devices or pool.topology.num_devices
    try:
        placement = solve_placement(problem)
    except PlacementError as error:
        needed_of_more = count_needed(model.problem, pool.topology)
        return DevicePlan(model, needed_of_more, allowed, bound, problem, None, str(error))
    needed = placement.num_devices
    if needed > allowed:
        shortfall = f"{needed} of the {pool.topology.num_devices} devices are needed, --devices allows {allowed}."
        return DevicePlan(model, needed, allowed, bound, problem, None, shortfall)
    if pool.is_open:
        problem = model.problem(Topology(pool.topology.devices[:needed]))
        placement = solve_placement(problem)
    return DevicePlan(model, needed, allowed, bound, problem, placement)


def count_needed(make_problem: MakeProblem, topology: Topology) -> int | None:
    """Count the devices that a model would need if there were more of them; ``None`` if they differ or none suffice."""
    more = larger_topology(topology)
    if more is None:
        return None
    try:
        return solve_placement(make_problem(more)).num_devices
    except PlacementError:
        return None


def predicted_bytes_per_token(placement: Placement, shape: ModelShape, weights: str) -> float:
    """Predict the bytes between devices of one token in all layers, both ways, if all experts are equally likely.

    FP16 experts get float16 rows, ternary ones int8 rows; one row and one sum for each device that a token visits.
    """
    row_format: RowFormat = "float16" if weights == "fp16" else "int8"
    traffic = expected_bytes_per_token(placement, shape.top_k, shape.hidden_size, row_format, COMBINE)
    return traffic.total_bytes
