"""A host is lost in the middle of a text: how long no token comes, and whether the text is the same.

    python -m benchmarks.recovery [--quick] [--json] [--output]

A ternary model generates; all of its experts are on two hosts, Ray actors in processes of their own. In mid-step, one
of them is lost. Rows are summed exactly, so the text must be that of an undisturbed model, token by token.

    killed, replicas       SIGKILL; the other host has copies of all experts
    killed, no replicas    SIGKILL; the experts of the lost host are loaded elsewhere, from Ray's object store
    stopped, replicas      SIGSTOP: the host is there and silent, as behind a cut link; its heartbeat is missed
"""

import argparse
import itertools
import os
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Report, add_arguments
from benchmarks.recovery_plot import plot_recovery
from benchmarks.synthetic import build_packed_model
from cluster.config import ClusterConfig
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.runtime import connect, start_expert_hosts
from cluster.topology import logical_devices
from kvcache import KVCacheConfig, QuantizedKVCache
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.config import ModelConfig
from moe_bitnet.generation import generate
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import Layout

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    num_experts=16,
    top_k=4,
)
LAYOUT: Layout = "2bit"
PROMPT_IDS = tuple(range(1, 17))
NUM_TOKENS, LOST_AFTER = 96, 32
TEMPERATURE = 1.0  # sampled with a seed, so that the text of random weights does not stand still
CACHE_BYTES = 64 << 20
NUM_HOSTS = 2
GOAL_S = 1.0


@dataclass(frozen=True)
class Fault:
    """One way of losing a host.

    Attributes:
        name: for the report.
        metric: of the report.
        signal_number: what is sent to its process.
        has_replicas: whether the other host has copies of its experts.
        goal_s: seconds without a token, at most.
    """

    name: str
    metric: str
    signal_number: int
    has_replicas: bool
    goal_s: float | None


FAULTS = (
    Fault("killed, replicas", "seconds_with_replica", signal.SIGKILL, True, GOAL_S),
    Fault("killed, no replicas", "seconds_without_replica", signal.SIGKILL, False, None),
    Fault("stopped, replicas", "seconds_silent_with_replica", signal.SIGSTOP, True, None),
)


@dataclass(frozen=True)
class Text:
    """What was generated.

    Attributes:
        token_ids: the tokens.
        gaps_s: seconds before each of them.
    """

    token_ids: tuple[int, ...]
    gaps_s: tuple[float, ...]


class Striker:
    """Loses a host in the middle of the step after a number of tokens.

    Args:
        process_id: of the host.
        signal_number: sent to it.
        after: tokens before that step.
    """

    def __init__(self, process_id: int, signal_number: int, after: int) -> None:
        self._process_id, self._signal_number, self._after = process_id, signal_number, after
        self._times_s: list[float] = []

    def on_token(self, token_id: int) -> None:
        """Take the time of a token, and start a timer for half a step when the moment has come."""
        self._times_s.append(time.perf_counter())
        if len(self._times_s) == self._after:
            recent = self._times_s[-9:]
            step_s = (recent[-1] - recent[0]) / (len(recent) - 1)
            threading.Timer(step_s / 2, os.kill, (self._process_id, self._signal_number)).start()


def write_text(model: MoETransformer, num_tokens: int, striker: Striker | None = None) -> Text:
    """Generate, and take the time of every token."""
    times_s = [time.perf_counter()]

    def on_token(token_id: int) -> None:
        times_s.append(time.perf_counter())
        if striker is not None:
            striker.on_token(token_id)

    token_ids = generate(model, PROMPT_IDS, num_tokens, _cache(), temperature=TEMPERATURE, seed=0, on_token=on_token)
    gaps_s = tuple(later - earlier for earlier, later in itertools.pairwise(times_s))
    return Text(tuple(token_ids), gaps_s)


def place(has_replicas: bool) -> tuple[PlacementProblem, Placement]:
    """Place all experts away from home: both copies on two hosts, or half of the experts on each."""
    sizes = model_sizes(MODEL, LAYOUT)
    room = sizes.expert_bytes * MODEL.num_layers * MODEL.num_experts + sizes.home_bytes
    topology = logical_devices(1 + NUM_HOSTS, room)
    problem = PlacementProblem(MODEL.num_layers, MODEL.num_experts, sizes.expert_bytes, sizes.home_bytes, topology)
    copies: list[list[int]] = [
        [1, 2] if has_replicas and expert % 2 == 0 else [2, 1] if has_replicas else [1 + expert % 2]
        for expert in range(MODEL.num_experts)
    ]
    names = [device.name for device in topology.devices]
    return problem, Placement.for_problem(problem, names, [copies] * MODEL.num_layers)


def lose_host(fault: Fault, expected: Sequence[int], num_tokens: int) -> Text:
    """Start hosts, generate, lose one of them; they end afterwards.

    Args:
        fault: which kind of loss.
        expected: the undisturbed text.
        num_tokens: to generate.
    """
    model = build_packed_model(MODEL, LAYOUT)
    problem, placement = place(fault.has_replicas)
    with start_expert_hosts(model, problem, placement, ClusterConfig(combine="rows")) as hosts:
        model.replace_experts(hosts.executors)
        write_text(model, num_tokens=8)  # warm up
        lost = hosts.hosts[placement.device_names[1]]
        process_id = int(lost.call("process_id")())
        try:
            return write_text(model, num_tokens, Striker(process_id, fault.signal_number, LOST_AFTER))
        finally:
            if fault.signal_number == signal.SIGSTOP:
                os.kill(process_id, signal.SIGCONT)


def measure_fault(report: Report, fault: Fault, expected: Text) -> None:
    """Lose a host a few times, each with hosts of its own, and report the longest pause of all."""
    num_runs = 1 if report.is_quick else 5
    texts = []
    for index in range(num_runs):
        report.progress(f"{fault.name}, {index + 1} of {num_runs}")
        texts.append(lose_host(fault, expected.token_ids, len(expected.token_ids)))
    pauses_s = [max(text.gaps_s[LOST_AFTER:]) for text in texts]
    usual_s = statistics.median(gap_s for text in texts for gap_s in text.gaps_s[1:])
    worst = texts[pauses_s.index(max(pauses_s))]
    detail: dict[str, Any] = {
        "fault": fault.name,
        "runs": num_runs,
        "median_s": statistics.median(pauses_s),
        "layers": MODEL.num_layers,
        "experts": MODEL.num_experts,
        "hosts": NUM_HOSTS,
        "ms_per_token": usual_s * 1e3,
        "pauses": {"all_s": pauses_s, "ms_between_tokens": [gap_s * 1e3 for gap_s in worst.gaps_s]},
    }
    report.add(fault.metric, max(pauses_s), "s", detail=detail, at_most=fault.goal_s)
    num_equal = sum(text.token_ids == expected.token_ids for text in texts)
    report.add(
        "equal_texts", num_equal / num_runs, "ratio", detail={"fault": fault.name, "runs": num_runs}, at_least=1.0
    )


def _cache() -> QuantizedKVCache:
    head_dim = MODEL.hidden_size // MODEL.num_heads
    config = KVCacheConfig(MODEL.num_layers, MODEL.num_kv_heads, head_dim, key_bits=16, value_bits=16)
    return QuantizedKVCache(config, CACHE_BYTES)


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Report("recovery", arguments, ("pyzmq", "ray")) as report, connect(ClusterConfig(num_cpus=2)):
        num_tokens = NUM_TOKENS * 2 // 3 if report.is_quick else NUM_TOKENS
        expected = write_text(build_packed_model(MODEL, LAYOUT), num_tokens)
        for fault in FAULTS[:2] if report.is_quick else FAULTS:
            measure_fault(report, fault, expected)
        if report.output_path is not None:
            plot_recovery(report.metrics, report.output_path.with_suffix(".png"))


if __name__ == "__main__":
    main()
