"""What a placement is worth, beside its bounds, in one line and as JSON.

3 devices, bound 3; 4.2 kB/token, uniform routing would give 6.9 kB; load up to 1.12 of the mean
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.placement.cost import copies_per_token, traffic_bytes
from cluster.placement.placement import Placement
from cluster.placement.solver import DEFAULT_MAX_IMBALANCE
from cluster.placement.traffic import measure_placement
from cluster.routing.trace import RoutingTrace
from cluster.transport.row_format import Combine, RowFormat
from moe_bitnet.errors import PlacementError
from moe_bitnet.units import format_bytes


@dataclass(frozen=True)
class TransferSize:
    """Bytes there and back, as in :mod:`cluster.placement.cost`, with a row sent once to a device.

    Attributes:
        bytes_per_visit: for a token's visit to a device away from home.
        bytes_per_pair: for each (token, expert) pair beside it.
    """

    bytes_per_visit: int
    bytes_per_pair: int

    @classmethod
    def of_rows(cls, hidden_size: int, dispatch_row: RowFormat, combine: Combine) -> "TransferSize":
        """Return the sizes for rows of ``hidden_size`` values in these formats.

        Raises:
            ConfigError: an unknown format.
        """
        visit, pair = (
            traffic_bytes(num_pairs, num_visits, hidden_size, dispatch_row, combine).total_bytes
            for num_pairs, num_visits in ((0, 1), (1, 0))
        )
        return cls(bytes_per_visit=int(visit), bytes_per_pair=int(pair))


@dataclass(frozen=True)
class PlacementReport:
    """Figures of one placement; traffic is for one token through all layers, devices are counted without the home.

    Attributes:
        num_devices: devices in use.
        device_bound: no placement of the model needs fewer.
        num_replicas: copies beyond the first of every expert.
        uniform_visits_per_token: visits if every set of experts were equally likely and had only its primary copies.
        uniform_bytes_per_token: bytes in that case.
        visits_per_token: visits in a replay of the trace; ``None`` without one, like all that follows.
        bytes_per_token: bytes in the replay.
        imbalance: of the worst layer: load of its most loaded device over the mean.
        mean_imbalance: of all layers.
        max_imbalance: the cap that was asked for.
        hottest_expert: of the worst layer: load of one expert over the mean of a device. Without replicas no
            placement has a lower imbalance.
    """

    num_devices: int
    device_bound: int
    num_replicas: int
    uniform_visits_per_token: float
    uniform_bytes_per_token: float
    visits_per_token: float | None = None
    bytes_per_token: float | None = None
    imbalance: float | None = None
    mean_imbalance: float | None = None
    max_imbalance: float | None = None
    hottest_expert: float | None = None

    @property
    def is_cap_reached(self) -> bool | None:
        """Whether every layer is under the load cap; ``None`` without a trace."""
        if self.imbalance is None or self.max_imbalance is None:
            return None
        return self.imbalance <= self.max_imbalance

    def summary(self) -> str:
        """Return the placement in one line for people."""
        devices = f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}, bound {self.device_bound}"
        if self.num_replicas:
            devices += f", {self.num_replicas} replicas"
        uniform = format_bytes(self.uniform_bytes_per_token)
        if self.bytes_per_token is None or self.imbalance is None:
            return f"{devices}; {uniform}/token if routing is uniform"
        traffic = f"{format_bytes(self.bytes_per_token)}/token, uniform routing would give {uniform}"
        return f"{devices}; {traffic}; load up to {self.imbalance:.2f} of the mean{self._excuse()}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, the one-line summary included."""
        return {**asdict(self), "is_cap_reached": self.is_cap_reached, "summary": self.summary()}

    def _excuse(self) -> str:
        if self.is_cap_reached is not False or self.max_imbalance is None or self.hottest_expert is None:
            return ""
        if self.hottest_expert > self.max_imbalance and not self.num_replicas:
            reason = f"one expert alone has {self.hottest_expert:.2f}; replicas would share it"
        else:
            reason = "memory leaves no better share"
        return f", above the cap of {self.max_imbalance:.2f} ({reason})"


def report_placement(
    placement: Placement,
    *,
    top_k: int,
    transfer: TransferSize,
    trace: RoutingTrace | None = None,
    max_imbalance: float = DEFAULT_MAX_IMBALANCE,
) -> PlacementReport:
    """Say what a placement is worth.

    Args:
        placement: any, solved or a user's own.
        top_k: K, experts that a token visits in a layer.
        transfer: bytes of a visit and of a pair.
        trace: routing to replay; best another part of the run than the placement was learned from.
        max_imbalance: the load cap that was asked for.
    Raises:
        ConfigError: ``top_k`` is impossible.
        PlacementError: the trace is of another model.
    """
    layers = range(placement.num_layers)
    counts = [
        [placement.primary_devices(layer).count(device) for device in range(placement.num_devices)] for layer in layers
    ]
    uniform_visits = sum(copies_per_token(each, top_k, has_dedup=True) for each in counts)
    uniform_pairs = sum(copies_per_token(each, top_k, has_dedup=False) for each in counts)
    report = PlacementReport(
        num_devices=placement.num_devices,
        device_bound=placement.lower_bound,
        num_replicas=placement.num_replicas,
        uniform_visits_per_token=uniform_visits,
        uniform_bytes_per_token=_bytes(transfer, uniform_visits, uniform_pairs),
    )
    return report if trace is None else _with_replay(report, placement, top_k, transfer, trace, max_imbalance)


def _with_replay(
    report: PlacementReport,
    placement: Placement,
    top_k: int,
    transfer: TransferSize,
    trace: RoutingTrace,
    max_imbalance: float,
) -> PlacementReport:
    if trace.top_k != top_k:
        raise PlacementError(f"the routing trace is of top {trace.top_k}, the model of top {top_k}. Record another.")
    layers = measure_placement(placement, trace)
    visits = sum(layer.visits_per_token for layer in layers)
    return replace(
        report,
        visits_per_token=visits,
        bytes_per_token=_bytes(transfer, visits, sum(layer.pairs_per_token for layer in layers)),
        imbalance=max(layer.imbalance for layer in layers),
        mean_imbalance=sum(layer.imbalance for layer in layers) / len(layers),
        max_imbalance=max_imbalance,
        hottest_expert=max(layer.hottest_expert for layer in layers),
    )


def _bytes(transfer: TransferSize, visits: float, pairs: float) -> float:
    return visits * transfer.bytes_per_visit + pairs * transfer.bytes_per_pair
