"""What placement by a routing trace saves, how near it comes to its bounds, and how long it takes.

    python -m benchmarks.placement [--quick] [--json] [--output]

Plans are learned from the first half of a synthetic trace and judged on the second. The clustered traces have a topic
for every token and experts that prefer topics (``cluster/routing/synthetic.py``): how much structure real routing has
differs from model to model. ``visits`` are of devices other than the home, a token counting once on a device: what
crosses a link. ``distinct_devices`` counts the home as well. Contiguous placement, the baseline, has equal numbers of
consecutive experts on each device. Plans are learned under a lower load cap than they are judged by, since the halves
differ.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Report, add_arguments
from benchmarks.placement_plot import plot_placement
from cluster.placement.exact_search import MAX_EXPERTS, solve_layer_exactly
from cluster.placement.layer_problem import layer_cost
from cluster.placement.layer_solver import contiguous_start
from cluster.placement.local_search import improve_layer
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.rebalance import rebalance_placement
from cluster.placement.replica_choice import ReplicaTable
from cluster.placement.solver import solve_placement
from cluster.placement.traced_solver import layer_problem
from cluster.placement.traffic import measure_placement, route, visits_of_devices
from cluster.routing.synthetic import clustered_trace, zipf_trace
from cluster.routing.trace import RoutingTrace
from cluster.topology import logical_devices
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_shape import WEIGHT_BITS

NUM_TOKENS = 65536
LEARNED_CAP, JUDGED_CAP = 1.12, 1.15
USABLE_GB = (20, 75)
"""Of cards with 24 and 80 GB."""
FORMATS = ("16", "2bit", "base3")


@dataclass(frozen=True)
class Figures:
    """A placement on the half of the trace that it was not learned from; means over layers.

    Attributes:
        visits: devices other than the home that a token visits in a layer.
        distinct_devices: the same with the home.
        imbalance: load of the most loaded device over the mean, of the worst layer.
    """

    visits: float
    distinct_devices: float
    imbalance: float


def judge(placement: Placement, trace: RoutingTrace) -> Figures:
    """Replay a trace."""
    layers = measure_placement(placement, trace)
    distinct = [
        visits_of_devices(route(copies, trace.layer(index), placement.num_devices), placement.num_devices).sum()
        for index, copies in enumerate(placement.devices_of_expert)
    ]
    return Figures(
        visits=float(np.mean([layer.visits_per_token for layer in layers])),
        distinct_devices=float(np.mean(distinct) / trace.num_tokens),
        imbalance=max(layer.imbalance for layer in layers),
    )


def problem_of(trace: RoutingTrace, num_devices: int, spare: int = 0) -> PlacementProblem:
    """Equal devices with room for an even share of the experts and ``spare`` more in each layer."""
    slots = trace.num_layers * (-(-trace.num_experts // num_devices) + spare)
    return PlacementProblem(trace.num_layers, trace.num_experts, 1, 0, logical_devices(num_devices, slots))


def measure_traffic(report: Report, num_layers: int, device_counts: tuple[int, ...]) -> None:
    """Compare visits with those of contiguous placement, learned on one half and judged on the other."""
    trace = clustered_trace(NUM_TOKENS // (2 if report.is_quick else 1), num_layers, 128, 8)
    learned, judged = trace.split_half()
    for num_devices in device_counts:
        report.progress(f"128 experts, top-8, {num_layers} layers on {num_devices} devices")
        problem = problem_of(trace, num_devices)
        contiguous = judge(solve_placement(problem, num_devices=num_devices), judged)
        placement = solve_placement(problem, trace=learned, num_devices=num_devices, max_imbalance=LEARNED_CAP)
        figures = judge(placement, judged)
        detail = {"experts": 128, "top_k": 8, "devices": num_devices, "layers": num_layers, "trace": "clustered"}
        has_goal = num_devices == 8
        for name, noun in (("visits", "visits"), ("distinct_devices", "devices")):
            value, base = getattr(figures, name), getattr(contiguous, name)
            report.add(
                f"{name}_vs_contiguous",
                value / base,
                "ratio",
                baseline=f"contiguous, {noun} a token and layer",
                baseline_value=base,
                detail={**detail, name: value},
                at_most=0.70 if has_goal else None,
            )
        report.add(
            "imbalance",
            figures.imbalance,
            "ratio",
            baseline="contiguous",
            baseline_value=contiguous.imbalance,
            detail=detail,
            at_most=JUDGED_CAP if has_goal else None,
        )


def measure_long_runs(report: Report) -> None:
    """Say what becomes of the load if 64 tokens in a row have one topic: the halves then differ by chance."""
    trace = clustered_trace(NUM_TOKENS, 1, 128, 8, run_length=64)
    learned, judged = trace.split_half()
    problem = problem_of(trace, 8)
    contiguous = judge(solve_placement(problem, num_devices=8), judged)
    placement = solve_placement(problem, trace=learned, num_devices=8, max_imbalance=LEARNED_CAP)
    figures = judge(placement, judged)
    detail = {"experts": 128, "top_k": 8, "devices": 8, "trace": "clustered, runs of 64 tokens"}
    report.add("long_runs_imbalance", figures.imbalance, "ratio", detail={**detail, "learned": LEARNED_CAP})
    report.add("long_runs_visits_vs_contiguous", figures.visits / contiguous.visits, "ratio", detail=detail)


def measure_seconds(report: Report, num_layers: int, num_tokens: int) -> None:
    """Time a large model: 256 experts on 32 devices."""
    report.progress(f"256 experts, {num_layers} layers on 32 devices")
    trace = clustered_trace(num_tokens, num_layers, 256, 8, num_topics=32, affinity=4.0)
    learned, judged = trace.split_half()
    problem = problem_of(trace, 32)
    start = time.perf_counter()
    placement = solve_placement(problem, trace=learned, num_devices=32, max_imbalance=LEARNED_CAP)
    seconds = time.perf_counter() - start
    contiguous, figures = judge(solve_placement(problem, num_devices=32), judged), judge(placement, judged)
    detail = {"experts": 256, "top_k": 8, "devices": 32, "layers": num_layers}
    quality = {"visits_vs_contiguous": figures.visits / contiguous.visits, "imbalance": figures.imbalance}
    report.add("solve_s", seconds, "s", detail={**detail, **quality}, at_most=20.0 if num_layers == 1 else None)


def measure_replicas(report: Report) -> None:
    """Even out hot experts: 256 of them, Zipf 0.8, on 32 devices with room for one replica each."""
    report.progress("replicas of hot experts")
    trace = zipf_trace(NUM_TOKENS, 1, 256, 8, exponent=0.8)
    learned, judged = trace.split_half()
    problem = problem_of(trace, 32, spare=1)
    alone, copied = (
        solve_placement(problem, trace=learned, num_devices=32, max_imbalance=LEARNED_CAP, with_replicas=with_replicas)
        for with_replicas in (False, True)
    )
    before, after = judge(alone, judged), judge(copied, judged)
    detail = {"experts": 256, "top_k": 8, "devices": 32, "trace": "Zipf 0.8", "replicas": copied.num_replicas}
    report.add(
        "replicas_imbalance",
        after.imbalance,
        "ratio",
        baseline="best without replicas",
        baseline_value=before.imbalance,
        detail=detail,
        at_most=JUDGED_CAP,
    )
    report.add("replicas_visits_vs_without", after.visits / before.visits, "ratio", detail=detail)
    measure_choice(report, copied, judged)


def measure_choice(report: Report, placement: Placement, trace: RoutingTrace) -> None:
    """Time the choice between copies, which the dispatcher makes for every step and layer."""
    table = ReplicaTable(placement.devices_of_expert[0], placement.num_devices)
    is_up, load = np.ones(placement.num_devices, dtype=bool), np.zeros(placement.num_devices)
    for num_tokens in (1, 4096):
        blocks = [trace.layer(0)[start : start + num_tokens] for start in range(0, 8 * num_tokens, num_tokens)]
        rounds = []
        for _ in range(30):
            start = time.perf_counter()
            for block in blocks:
                table.choose(block, is_up, load)
            rounds.append((time.perf_counter() - start) / len(blocks))
        report.add("choose_copies_s", float(np.median(rounds)), "s", detail={"tokens": num_tokens, "top_k": 8})


def measure_optimum(report: Report, num_seeds: int) -> None:
    """Compare small layers with the exact optimum: what the solver gives, and what its local search alone would."""
    report.progress("small layers against the optimum")
    solver_gaps, local_gaps = [], []
    for num_experts, num_devices, top_k in ((8, 4, 2), (8, 2, 2), (12, 3, 4), (16, 2, 4), (MAX_EXPERTS, 4, 4)):
        for seed in range(num_seeds):
            trace = clustered_trace(2000, 1, num_experts, top_k, num_topics=4, seed=seed)
            problem = problem_of(trace, num_devices, spare=1)
            room, visit_costs = np.full(num_devices, -(-num_experts // num_devices) + 1), np.ones(num_devices)
            visit_costs[0] = 0.0
            layer = layer_problem(trace, 0, room, visit_costs, JUDGED_CAP)
            optimum = layer_cost(layer, solve_layer_exactly(layer))
            placement = solve_placement(problem, trace=trace, num_devices=num_devices, max_imbalance=JUDGED_CAP)
            solver_gaps.append(layer_cost(layer, np.array(placement.primary_devices(0))) / optimum - 1)
            local = improve_layer(layer, contiguous_start(layer), 100, np.random.default_rng(seed))
            local_gaps.append(layer_cost(layer, local) / optimum - 1)
    detail = {"experts": "8 to 16", "layers": len(solver_gaps)}
    report.add("optimum_gap", max(solver_gaps), "ratio", detail=detail, at_most=1e-9)
    report.add(
        "local_search_gap",
        max(local_gaps),
        "ratio",
        detail={**detail, "mean": float(np.mean(local_gaps)), "shakes": 100},
    )


def measure_devices(report: Report) -> None:
    """Count devices above the bound, for expert weights of all catalogue shapes."""
    above, counts = 0, {}
    for name, shape in KNOWN_SHAPES.items():
        if shape.num_experts == 1:
            continue
        for usable_gb in USABLE_GB:
            for weight_format in FORMATS:
                weights = 3 * shape.hidden_size * shape.intermediate_size
                expert_bytes = int(np.ceil(weights * WEIGHT_BITS[weight_format] / 8))
                num_layers = shape.num_layers - shape.num_dense_layers
                topology = logical_devices(128, usable_gb * 10**9)
                placement = solve_placement(PlacementProblem(num_layers, shape.num_experts, expert_bytes, 0, topology))
                above += placement.num_devices - placement.lower_bound
                counts[f"{name} {weight_format} {usable_gb} GB"] = placement.num_devices
    detail = {"cases": len(counts), "table": {"devices": counts}}
    report.add("devices_over_bound", above, "devices", detail=detail, at_most=0)


def measure_rebalance(report: Report) -> None:
    """Lose one device of eight: what moves, against solving anew."""
    report.progress("re-planning after a loss")
    trace = clustered_trace(NUM_TOKENS, 1, 128, 8)
    before, after = problem_of(trace, 8, spare=3), logical_devices(7, 19)
    old = solve_placement(before, trace=trace, num_devices=8)
    problem = PlacementProblem(1, 128, 1, 0, after)
    result = rebalance_placement(problem, old, trace=trace, horizon_tokens=1.0, bytes_per_visit=1e-6)
    anew = solve_placement(problem, trace=trace, num_devices=7)
    moved_anew = sum(
        anew.device_names[new] != old.device_names[before_device]
        for new, before_device in zip(anew.primary_devices(0), old.primary_devices(0), strict=True)
    )
    figures, best = judge(result.placement, trace), judge(anew, trace)
    report.add(
        "rebalance_moved_experts",
        len(result.moves),
        "experts",
        baseline="solved anew, experts",
        baseline_value=moved_anew,
        detail={
            "lost": len(old.expert_ids_on(7, 0)),
            "visits_vs_anew": figures.visits / best.visits,
            "imbalance": figures.imbalance,
        },
    )


def main() -> None:
    """Measure and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    with Report("placement", arguments) as report:
        measure_devices(report)
        measure_traffic(report, 4, (8,) if report.is_quick else (2, 4, 8, 16, 32))
        measure_optimum(report, 1 if report.is_quick else 5)
        measure_seconds(report, 1, NUM_TOKENS // (2 if report.is_quick else 1))
        measure_replicas(report)
        if not report.is_quick:
            measure_long_runs(report)
            measure_rebalance(report)
            measure_seconds(report, 58, NUM_TOKENS // 4)
        if report.output_path is not None:
            plot_placement(report.metrics, report.output_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
