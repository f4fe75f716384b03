"""One way of sending rows, run: tokens through a dispatcher to real hosts, and the bytes that this took."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.expert_processes import LAYER, Hosts
from benchmarks.network import LinkCounts
from cluster.dispatch_batch import RowRules
from cluster.expert_store import ExpertStore
from cluster.placement.cost import bytes_per_token
from cluster.placement.placement import Placement
from cluster.remote_experts import Dispatcher, DispatchPlan
from cluster.routing.synthetic import clustered_trace
from cluster.routing.trace import RoutingTrace
from cluster.transport.links import HostLinks
from cluster.transport.meter import TrafficMeter
from cluster.transport.row_format import Combine
from moe_bitnet.router import Routing

MODES = {
    "fp16, no dedup": RowRules("float16", Combine("partial_sums", "float16"), has_dedup=False),
    "fp16": RowRules("float16", Combine("partial_sums", "float16")),
    "int8, fp16 back": RowRules("int8", Combine("partial_sums", "float16")),
    "int8 both ways": RowRules("int8", Combine("partial_sums", "int8")),
    "int8, float32 sums back": RowRules("int8", Combine("partial_sums", "float32")),
    "int8, float32 rows back": RowRules("int8", Combine("rows", "float32")),
}
"""Ways of sending rows. Without dedup a row travels once for each expert, and as often back. The last is exact."""

SEGMENT_BYTES = 1500
_SETTLE_S = 0.05  # the last acknowledgement is on its way for up to 40 ms
_NUM_WARMUPS = 2


@dataclass(frozen=True)
class Workload:
    """Tokens and where they go.

    Attributes:
        placement_name: for the report.
        choices: of one layer.
        tokens_per_step: tokens that go through the layer together.
    """

    placement_name: str
    choices: RoutingTrace
    tokens_per_step: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return self.choices.num_tokens

    @property
    def num_steps(self) -> int:
        """Steps, all of them full."""
        return self.num_tokens // self.tokens_per_step

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.choices.top_k


@dataclass(frozen=True)
class Run:
    """What a workload took; bytes are those of all tokens, except for the formula's.

    Attributes:
        logical_bytes: rows, scales and metadata.
        counted_bytes: all that the meter counted.
        estimated_bytes: the meter's estimate for an Ethernet with packets of 1500 bytes.
        formula_bytes: rows and metadata of one token under uniform routing.
        wire: of the virtual Ethernet; ``None`` if there is none.
        seconds: of all steps.
    """

    logical_bytes: int
    counted_bytes: int
    estimated_bytes: int
    formula_bytes: float
    wire: LinkCounts | None
    seconds: float

    @property
    def crossed_bytes(self) -> int:
        """Bytes on the wire, or by the meter where no wire was counted."""
        return self.counted_bytes if self.wire is None else self.wire.num_bytes


def uniform_choices(num_tokens: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """Route tokens so that every set of experts is equally likely."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, LAYER.num_experts, generator=generator).argsort(dim=1)
    return RoutingTrace(order[:, None, :top_k].numpy(), LAYER.num_experts)


def clustered_choices(num_learned: int, num_tested: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Route tokens by topics; returns a part to learn from and another to measure."""
    trace = clustered_trace(num_learned + num_tested, 1, LAYER.num_experts, LAYER.top_k, num_topics=8)
    parts = trace.expert_indices[:num_learned], trace.expert_indices[num_learned:]
    return RoutingTrace(parts[0], LAYER.num_experts), RoutingTrace(parts[1], LAYER.num_experts)


def run_steps(
    rules: RowRules, placement: Placement, workload: Workload, home: ExpertStore, links: HostLinks, hosts: Hosts
) -> Run:
    """Send all tokens, and count.

    Args:
        rules: the way of sending rows.
        placement: its devices are the home and the first of the hosts.
        workload: the tokens.
        home: holds all experts.
        links: connected to all hosts.
        hosts: hold all experts.
    Returns:
        Bytes and seconds, after a few steps that are not counted.
    """
    meter = TrafficMeter()
    dispatcher = Dispatcher(DispatchPlan.of(placement), links, home, meter, rules)
    steps = make_steps(workload)
    for hidden_states, routing in steps[:_NUM_WARMUPS]:
        dispatcher.run(0, hidden_states, routing)
    time.sleep(_SETTLE_S)
    meter.reset()
    before = None if hosts.links is None else hosts.links.counts()
    start_s = time.perf_counter()
    for hidden_states, routing in steps:
        dispatcher.run(0, hidden_states, routing)
    seconds = time.perf_counter() - start_s
    time.sleep(_SETTLE_S)
    wire = None if hosts.links is None or before is None else hosts.links.counts() - before
    return Run(
        logical_bytes=meter.inter_device_bytes(("payload", "metadata")),
        counted_bytes=meter.inter_device_bytes(),
        estimated_bytes=meter.wire_bytes(),
        formula_bytes=bytes_per_token(
            placement.num_experts_per_device(0),
            workload.top_k,
            LAYER.hidden_size,
            rules.dispatch,
            rules.combine,
            rules.has_dedup,
        ).total_bytes,
        wire=wire,
        seconds=seconds,
    )


def make_steps(workload: Workload) -> list[tuple[Tensor, Routing]]:
    """Make random rows, and the routing of every step."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for start in range(0, workload.num_steps * workload.tokens_per_step, workload.tokens_per_step):
        chosen = workload.choices.layer(0)[start : start + workload.tokens_per_step]
        rows = torch.randn(len(chosen), LAYER.hidden_size, generator=generator)
        weights = torch.rand(chosen.shape, generator=generator)
        logits = torch.zeros(len(chosen), LAYER.num_experts)  # nobody looks at them any more
        indices = torch.from_numpy(chosen.astype("int64"))
        steps.append((rows, Routing(indices, weights / weights.sum(dim=1, keepdim=True), logits)))
    return steps
