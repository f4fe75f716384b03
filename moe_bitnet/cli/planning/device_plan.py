"""How many devices a model needs, in one format of its experts and one way of counting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.placement.bound import device_lower_bound
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.report import PlacementReport, TransferSize, report_placement
from cluster.placement.solver import DEFAULT_MAX_IMBALANCE, solve_placement
from cluster.routing.trace import RoutingTrace
from cluster.topology import Topology
from cluster.transport.row_format import Combine
from moe_bitnet.cli.planning.device_pool import DevicePool, larger_topology
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.errors import PlacementError

Counted = Literal["experts only", "everything", "own placement"]
"""Expert weights; or shared weights and a key/value cache at home as well; or these as a user placed them."""

MakeProblem = Callable[[Topology], PlacementProblem]
Solve = Callable[[PlacementProblem], Placement]


COMBINE = Combine("partial_sums", "float16")
"""What comes home in predicted traffic: the same for both models, so that the way out is all that differs."""


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


def plan_devices(model: ModelBytes, pool: DevicePool, solve: Solve = solve_placement) -> DevicePlan:
    """Place a model on the fewest devices of a pool; where they are too few, count how many it would take.

    Args:
        model: what to place.
        pool: the devices.
        solve: places it, once the number of devices is known.
    """
    problem = model.problem(pool.topology)
    bound, allowed = device_lower_bound(problem), pool.max_devices or pool.topology.num_devices
    try:
        needed = solve_placement(problem).num_devices
    except PlacementError as error:
        needed_of_more = count_needed(model.problem, pool.topology)
        return DevicePlan(model, needed_of_more, allowed, bound, problem, None, str(error))
    if needed > allowed:
        shortfall = f"{needed} of the {pool.topology.num_devices} devices are needed, --devices allows {allowed}."
        return DevicePlan(model, needed, allowed, bound, problem, None, shortfall)
    if pool.is_open:
        problem = model.problem(Topology(pool.topology.devices[:needed]))
    return DevicePlan(model, needed, allowed, bound, problem, solve(problem))


def count_needed(make_problem: MakeProblem, topology: Topology) -> int | None:
    """Count the devices that a model would need if there were more of them; ``None`` if they differ or none suffice."""
    more = larger_topology(topology)
    if more is None:
        return None
    try:
        return solve_placement(make_problem(more)).num_devices
    except PlacementError:
        return None


def report_plan(
    plan: DevicePlan,
    shape: ModelShape,
    trace: RoutingTrace | None = None,
    max_imbalance: float = DEFAULT_MAX_IMBALANCE,
) -> PlacementReport | None:
    """Say what a plan is worth; ``None`` if it does not fit.

    FP16 experts get float16 rows, ternary ones int8 rows; what comes home is ``COMBINE`` for both.

    Args:
        plan: of a model with these sizes.
        shape: its sizes.
        trace: routing to replay; without one every set of K experts is equally likely.
        max_imbalance: the load cap that was asked for.
    """
    if plan.placement is None:
        return None
    transfer = TransferSize.of_rows(shape.hidden_size, "float16" if plan.model.weights == "fp16" else "int8", COMBINE)
    return report_placement(
        plan.placement, top_k=shape.top_k, transfer=transfer, trace=trace, max_imbalance=max_imbalance
    )
