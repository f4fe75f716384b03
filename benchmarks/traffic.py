"""Bytes between a model and its expert hosts: predicted, counted by the meter, and counted by the network devices.

    python -m benchmarks.traffic [--quick] [--json] [--output]

One MoE layer with rows, experts and choices of OLMoE-1B-7B (arXiv:2409.02060); its experts are narrow, so that moving
rows is not lost in computing them. Hosts are processes with networks of their own (network namespaces, joined by
virtual Ethernet), reached by ZeroMQ over TCP with CURVE, as machines are. Where namespaces are not permitted they are
reached by the loopback, no wire is counted, and the lines say so. For each way of sending rows, all of them run:

    logical    rows, scales and metadata, from the meter
    meter      all that it counts: with frame headers, ZeroMQ's framing and encryption
    wire       both directions of the virtual Ethernet, with TCP, IP and Ethernet headers: packets of up to 64 KiB, as
               cards take them that cut up packets themselves ("joined"), and of 1500 bytes
    formula    rows and metadata under uniform routing (:mod:`cluster.placement.cost`), which is how tokens are routed

Two tokens' experts are independent of each other, except on the clustered trace of the placements.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import network
from benchmarks.expert_processes import HEARTBEAT_S, LAYER, Hosts, expert_hosts, full_store
from benchmarks.harness import Report, add_arguments
from benchmarks.traffic_plot import plot_traffic
from benchmarks.traffic_run import MODES, SEGMENT_BYTES, Run, Workload, clustered_choices, run_steps, uniform_choices
from cluster.dispatch_batch import RowRules
from cluster.expert_store import ExpertStore
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import logical_devices
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.sockets import KeyPair

NUM_TOKENS = {1: 256, 16: 64, 256: 16, 1024: 8}
"""Tokens a step → steps."""

JOINED_BYTES = 65536
FEW_DEVICES, MANY_DEVICES = 2, 4
NAIVE, FP16, INT8 = "fp16, no dedup", "fp16", "int8 both ways"
MIN_TOKENS_OF_GOALS = 256
EXACTNESS = 0.01
_MAX_RUNS = 5


class Bench:
    """The home, its links, and what is measured with them.

    Args:
        report: gets the metrics.
        hosts: running.
        links: connected to them.
    """

    def __init__(self, report: Report, hosts: Hosts, links: HostLinks) -> None:
        self.report, self.hosts, self.links = report, hosts, links
        self.home: ExpertStore = full_store("device-0")

    def _run_undisturbed(self, rules: RowRules, placement: Placement, workload: Workload) -> tuple[Run, int]:
        """Run until TCP sent no segment twice, which it does when a host waits for a core; the best of a few runs."""
        best: tuple[Run, int] | None = None
        for _ in range(_MAX_RUNS):
            before = network.retransmitted_segments(self.hosts.process_ids)
            result = run_steps(rules, placement, workload, self.home, self.links, self.hosts)
            num_again = network.retransmitted_segments(self.hosts.process_ids) - before
            if best is None or num_again < best[1]:
                best = result, num_again
            if num_again == 0:
                break
        assert best is not None
        return best

    def run(self, mode: str, placement: Placement, workload: Workload, segments: str = "joined") -> Run:
        """Send all tokens of a workload once in one mode, and report its bytes a token."""
        result, num_again = self._run_undisturbed(MODES[mode], placement, workload)
        wire = None if result.wire is None else result.wire.num_bytes / workload.num_tokens
        meter = result.counted_bytes / workload.num_tokens
        detail = self._detail(mode, placement, workload, segments)
        detail |= {
            "logical": result.logical_bytes / workload.num_tokens,
            "meter": meter,
            "formula": result.formula_bytes,
            "wire": wire,
            "ms_per_step": result.seconds / workload.num_steps * 1e3,
        }
        if result.wire is not None:
            detail["wire_packets"] = result.wire.num_packets
            detail["retransmitted_segments"] = num_again
        self.report.add("bytes_per_token", meter if wire is None else wire, "bytes", detail=detail)
        return result

    def compare_counters(self, mode: str, placement: Placement, workload: Workload, segments: str, run: Run) -> None:
        """Report how far the meter and the formula are from the wire."""
        if run.wire is None:
            return
        detail = self._detail(mode, placement, workload, segments)
        wire = run.wire.num_bytes
        expected = run.counted_bytes if segments == "joined" else run.estimated_bytes
        reaches = workload.tokens_per_step >= MIN_TOKENS_OF_GOALS
        self.report.add(
            "meter_vs_wire",
            abs(expected / wire - 1.0),
            "ratio",
            baseline="wire, bytes a token",
            baseline_value=wire / workload.num_tokens,
            detail={**detail, "meter_over_wire": expected / wire},
            at_most=EXACTNESS if reaches else None,
        )
        self.report.add(
            "formula_vs_wire",
            abs(run.formula_bytes * workload.num_tokens / wire - 1.0),
            "ratio",
            baseline="wire, bytes a token",
            baseline_value=wire / workload.num_tokens,
            detail={**detail, "formula_over_wire": run.formula_bytes * workload.num_tokens / wire},
        )

    def compare_modes(self, runs: dict[str, Run], placement: Placement, workload: Workload) -> None:
        """Report by how much each mode is below the two baselines in FP16."""
        reaches = workload.tokens_per_step >= MIN_TOKENS_OF_GOALS and workload.top_k == LAYER.top_k
        goals = {NAIVE: 7.5, FP16: 1.9} if reaches and placement.num_devices == FEW_DEVICES else {}
        for name, baseline in (("reduction_vs_fp16_naive", NAIVE), ("reduction_vs_fp16_dedup", FP16)):
            for mode, run in runs.items():
                if mode in (NAIVE, baseline):
                    continue
                self.report.add(
                    name,
                    runs[baseline].crossed_bytes / run.crossed_bytes,
                    "ratio",
                    baseline=f"{baseline}, bytes a token",
                    baseline_value=runs[baseline].crossed_bytes / workload.num_tokens,
                    detail=self._detail(mode, placement, workload, "joined"),
                    at_least=goals.get(baseline) if mode == INT8 else None,
                )

    def _detail(self, mode: str, placement: Placement, workload: Workload, segments: str) -> dict[str, Any]:
        detail: dict[str, Any] = {
            "mode": mode,
            "tokens_per_step": workload.tokens_per_step,
            "devices": placement.num_devices,
            "k": workload.top_k,
            "placement": workload.placement_name,
            "hidden_size": LAYER.hidden_size,
            "experts": LAYER.num_experts,
            "intermediate_size": LAYER.intermediate_size,
            "tokens": workload.num_tokens,
        }
        if self.hosts.links is not None:
            return {**detail, "packets": segments}
        return {**detail, "network": f"loopback, not counted: {network.reason_against() or 'not asked for'}"}


@contextmanager
def start(report: Report) -> Iterator[Bench]:
    """Start hosts for the larger number of devices, and connect to them."""
    keys = KeyPair.generate()
    names = [f"device-{index}" for index in range(1, MANY_DEVICES)]
    with expert_hosts(names, keys.public, has_networks=network.is_inside()) as hosts:
        limits = FrameLimits(max_hidden_size=LAYER.hidden_size)
        links = HostLinks("home", keys, limits, LinkTimes(heartbeat_s=HEARTBEAT_S))
        try:
            links.set_addresses(hosts.addresses)
            for name in names:
                links.probe(name)
            yield Bench(report, hosts, links)
        finally:
            links.close()


def contiguous(num_devices: int) -> Placement:
    """Place equal runs of consecutive experts."""
    problem = placement_problem(num_devices, LAYER.num_experts)
    return solve_placement(problem, num_devices=num_devices)


def placement_problem(num_devices: int, experts_each: int) -> PlacementProblem:
    """Make the problem of placing the layer on equal devices with room for some experts each."""
    topology = logical_devices(num_devices, experts_each)
    return PlacementProblem(1, LAYER.num_experts, expert_bytes=1, home_bytes=0, topology=topology)


def measure_modes(bench: Bench) -> None:
    """All modes at all numbers of tokens a step, on two devices."""
    placement = contiguous(FEW_DEVICES)
    for tokens_per_step, num_steps in NUM_TOKENS.items():
        if bench.report.is_quick:
            num_steps = max(2, num_steps // 4)
        workload = Workload("contiguous", uniform_choices(tokens_per_step * num_steps, LAYER.top_k), tokens_per_step)
        runs = {}
        for mode in MODES:
            bench.report.progress(f"{mode}, {tokens_per_step} tokens a step")
            runs[mode] = bench.run(mode, placement, workload)
            bench.compare_counters(mode, placement, workload, "joined", runs[mode])
        bench.compare_modes(runs, placement, workload)


def measure_segments(bench: Bench) -> None:
    """The same, with packets as they are on a wire."""
    if bench.hosts.links is None:
        return
    placement = contiguous(FEW_DEVICES)
    tokens_per_step = MIN_TOKENS_OF_GOALS
    workload = Workload("contiguous", uniform_choices(tokens_per_step * 8, LAYER.top_k), tokens_per_step)
    bench.hosts.links.limit_packets(bench.hosts.process_ids, SEGMENT_BYTES)
    for mode in MODES:
        bench.report.progress(f"{mode}, packets of {network.MTU_BYTES} bytes")
        run = bench.run(mode, placement, workload, "1500 bytes")
        bench.compare_counters(mode, placement, workload, "1500 bytes", run)
    bench.hosts.links.limit_packets(bench.hosts.process_ids, JOINED_BYTES)


def measure_shapes(bench: Bench) -> None:
    """More devices, and fewer experts a token."""
    for num_devices, top_k in ((MANY_DEVICES, LAYER.top_k), (FEW_DEVICES, 2), (MANY_DEVICES, 2)):
        placement = contiguous(num_devices)
        tokens_per_step = MIN_TOKENS_OF_GOALS
        workload = Workload("contiguous", uniform_choices(tokens_per_step * 8, top_k), tokens_per_step)
        bench.report.progress(f"{num_devices} devices, {top_k} experts a token")
        runs = {mode: bench.run(mode, placement, workload) for mode in (NAIVE, FP16, INT8)}
        for mode, run in runs.items():
            bench.compare_counters(mode, placement, workload, "joined", run)
        bench.compare_modes(runs, placement, workload)


def measure_placements(bench: Bench) -> None:
    """Placements on a clustered trace: learned on one half, measured on the other."""
    tokens_per_step, num_steps = MIN_TOKENS_OF_GOALS, 8
    learned, tested = clustered_choices(num_learned=8192, num_tested=tokens_per_step * num_steps)
    room = -(-LAYER.num_experts // MANY_DEVICES) * 5 // 4
    problem = placement_problem(MANY_DEVICES, room)
    placements = {
        "contiguous": solve_placement(problem, num_devices=MANY_DEVICES),
        "by trace": solve_placement(problem, trace=learned, num_devices=MANY_DEVICES),
        "one device": solve_placement(placement_problem(1, LAYER.num_experts)),
    }
    for name, placement in placements.items():
        workload = Workload(f"{name}, clustered trace", tested, tokens_per_step)
        bench.report.progress(f"placement: {name}")
        bench.run(INT8, placement, workload)


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    reason = network.reason_against()
    if not network.is_inside() and reason is None:
        network.enter("benchmarks.traffic", sys.argv[1:])
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure in the network that this process has."""
    torch.set_num_threads(1)
    with Report("traffic", arguments, ("pyzmq",)) as report, start(report) as bench:
        if not network.is_inside():
            report.progress(f"by the loopback; nothing is counted on a wire: {network.reason_against()}")
        measure_modes(bench)
        if not report.is_quick:
            measure_segments(bench)
        measure_shapes(bench)
        measure_placements(bench)
        if report.output_path is not None:
            plot_traffic(report.metrics, report.output_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
