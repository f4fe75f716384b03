"""One dispatch to two hosts on one machine, without experts: against plain TCP and against actor calls.

    python -m benchmarks.dispatch_latency [--quick] [--json] [--output]

Rows of OLMoE's size (arXiv:2409.02060), int8, four experts of each on each of two hosts: an exchange sends a frame to
both hosts and receives int8 sums from both. Hosts are processes; they check and read a frame and write an answer as an
expert host does, but compute nothing. In turns, in one run:

    tcp          sockets with TCP_NODELAY that carry as many bytes, unread, without a frame around them
    ipc, unread  our connections and servers by a Unix socket, frames written beforehand and unread: the transport alone
    ipc          HostLinks by a Unix socket, as between processes of one machine: frames are built, checked and read
    tcp, CURVE   HostLinks by TCP, encrypted, as between machines
    actor calls  two Ray actors and the same bytes, unread
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import zmq

from benchmarks.answering import LIMITS, TcpEcho, answer_frame, dispatch_frame, frame_server, tcp_server
from benchmarks.grouped_bars import Panel, plot_bars
from benchmarks.harness import Report, add_arguments
from benchmarks.peers.actor_calls import ActorCalls, actor_calls
from benchmarks.timing import Comparison, Function, compare
from cluster.machine import machine_id
from cluster.transport.codec import decode, encode
from cluster.transport.connection import HostConnection
from cluster.transport.frames import DispatchFrame
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.sockets import HostAddress, KeyPair
from moe_bitnet.errors import ClusterError

HIDDEN_SIZE, EXPERTS_EACH, NUM_HOSTS = 2048, 4, 2
NUM_TOKENS = (1, 16, 256)
TCP, UNREAD, IPC, CURVE, ACTORS = "tcp", "ipc, unread", "ipc", "tcp, CURVE", "actor calls"
_PATIENCE_MS = 10_000
GOAL_TCP, GOAL_ACTORS = 5.0, 8.0


@dataclass(frozen=True)
class Peers:
    """What is compared, connected and warm."""

    ports: Sequence[int]
    addresses: Sequence[HostAddress]
    links: Mapping[str, HostLinks]
    unread: Sequence[HostConnection]
    actors: ActorCalls


@contextmanager
def start_peers() -> Iterator[Peers]:
    """Start two processes of every kind, and connect to them."""
    keys = KeyPair.generate()
    with ExitStack() as stack:
        actors = stack.enter_context(actor_calls(NUM_HOSTS))
        ports = [stack.enter_context(tcp_server()) for _ in range(NUM_HOSTS)]
        servers = [stack.enter_context(frame_server(keys.public)) for _ in range(NUM_HOSTS)]
        addresses = [replace(server, device_name=f"host-{index}") for index, server in enumerate(servers)]
        links = {IPC: HostLinks(machine_id(), keys, LIMITS, LinkTimes())}
        links[CURVE] = HostLinks("another machine", keys, LIMITS, LinkTimes())
        for each in links.values():
            stack.callback(each.close)
            each.set_addresses(addresses)
            for address in addresses:
                each.probe(address.device_name)
        context = stack.enter_context(zmq.Context())
        unread = []
        for _ in range(NUM_HOSTS):
            address = stack.enter_context(frame_server(keys.public, reads=False))
            times = LinkTimes(heartbeat_s=10.0)  # no stall of this machine may end it: nobody here would connect again
            connection = HostConnection(
                context, address, machine_id(), keys, LIMITS, times.heartbeat_s, times.connect_timeout_s
            )
            stack.callback(connection.close)
            unread.append(connection)
        yield Peers(ports, addresses, links, unread, actors)


@contextmanager
def candidates(peers: Peers, frame: DispatchFrame) -> Iterator[dict[str, Function]]:
    """Yield one exchange of every kind, for frames of this size."""
    request, answer = encode(frame), encode(answer_frame(frame))
    with ExitStack() as stack:
        echoes = [TcpEcho(port, request, len(answer)) for port in peers.ports]
        for echo in echoes:
            stack.callback(echo.close)

        def tcp() -> None:
            for echo in echoes:
                echo.send()
            for echo in echoes:
                echo.receive()

        def unread() -> None:
            for connection in peers.unread:
                connection.send(request)
            for connection in peers.unread:
                if not connection.socket.poll(_PATIENCE_MS):
                    raise ClusterError(f"no answer came: {connection.notice_loss() or 'the connection stands'}.")
                assert len(connection.socket.recv()) == len(answer)

        yield {
            TCP: tcp,
            UNREAD: unread,
            IPC: _exchange(peers.links[IPC], peers.addresses, frame),
            CURVE: _exchange(peers.links[CURVE], peers.addresses, frame),
            ACTORS: lambda: peers.actors.exchange(request, len(answer)),
        }


def _exchange(links: HostLinks, addresses: Sequence[HostAddress], frame: DispatchFrame) -> Callable[[], None]:
    names = [address.device_name for address in addresses]

    def run() -> None:
        requests = {name: links.send(name, frame) for name in names}
        for answer in links.wait(requests):
            if answer.frame is None:
                raise answer.error or ClusterError(f"{answer.device_name} gave no answer.")

    return run


def measure_exchange(report: Report, peers: Peers, num_tokens: int) -> None:
    """Time all kinds in turns, and report ours against the others."""
    frame = dispatch_frame(num_tokens, HIDDEN_SIZE, EXPERTS_EACH)
    num_rounds = (8 if report.is_quick else 40) if num_tokens < 256 else (4 if report.is_quick else 16)
    with candidates(peers, frame) as functions:
        turns = compare(functions, num_rounds=num_rounds, num_calls=50, num_settling_calls=5)
    detail: dict[str, Any] = {
        "tokens": num_tokens,
        "hidden_size": HIDDEN_SIZE,
        "hosts": NUM_HOSTS,
        "bytes_there": len(encode(frame)),
        "bytes_back": len(encode(answer_frame(frame))),
    }
    for kind in (UNREAD, IPC, CURVE):
        goals = kind == UNREAD and num_tokens == 1
        own = {"transport": kind, **detail, **_microseconds(turns, kind), **turns.to_detail()}
        report.add(
            "vs_tcp_echo",
            1.0 / turns.speedup(kind, TCP),
            "ratio",
            baseline="plain TCP, us",
            baseline_value=turns[TCP].median_s * 1e6,
            detail=own,
            at_most=GOAL_TCP if goals else None,
        )
        report.add(
            "vs_actor_call",
            turns.speedup(kind, ACTORS),
            "ratio",
            baseline="Ray actor calls, us",
            baseline_value=turns[ACTORS].median_s * 1e6,
            detail=own,
            at_least=GOAL_ACTORS if goals else None,
        )
    for kind in functions:
        report.add(
            "p50",
            turns[kind].median_s * 1e6,
            "us",
            detail={"transport": kind, **detail, "us_p90": turns[kind].p90_s * 1e6},
        )
    _measure_codec(report, frame, detail, turns[IPC].median_s)


def _microseconds(turns: Comparison, kind: str) -> dict[str, float]:
    return {"us_p50": turns[kind].median_s * 1e6, "us_p90": turns[kind].p90_s * 1e6}


def _measure_codec(report: Report, frame: DispatchFrame, detail: Mapping[str, Any], exchange_s: float) -> None:
    """Time reading and writing frames alone: both at home for two hosts, and once at a host, lie on the way."""
    answer = answer_frame(frame)
    request_bytes, answer_bytes = bytearray(encode(frame)), bytearray(encode(answer))
    turns = compare(
        {
            "encode_dispatch": lambda: encode(frame),
            "decode_dispatch": lambda: decode(request_bytes, LIMITS),
            "encode_combine": lambda: encode(answer),
            "decode_combine": lambda: decode(answer_bytes, LIMITS),
        },
        num_rounds=5,
        num_calls=100,
    )
    seconds = {name: timing.median_s for name, timing in turns.timings.items()}
    at_home_s = NUM_HOSTS * (seconds["encode_dispatch"] + seconds["decode_combine"])
    at_host_s = seconds["decode_dispatch"] + seconds["encode_combine"]
    report.add(
        "codec_share",
        (at_home_s + at_host_s) / exchange_s,
        "ratio",
        baseline="exchange by ipc, us",
        baseline_value=exchange_s * 1e6,
        detail={
            **detail,
            **{f"us_{name}": each_s * 1e6 for name, each_s in seconds.items()},
            "other_cpu_share": turns["encode_dispatch"].other_cpu_share,
        },
    )


def plot(report: Report) -> None:
    """Draw the median and the ninth decile of every kind, a panel a size."""
    assert report.output_path is not None
    times = [metric for metric in report.metrics if metric.metric.endswith(".p50")]
    panels = []
    for num_tokens in NUM_TOKENS:
        bars = [metric for metric in times if metric.detail["tokens"] == num_tokens]
        panels.append(
            Panel(
                title=f"{num_tokens} token{'s' if num_tokens > 1 else ''}",
                labels=[str(metric.detail["transport"]) for metric in bars],
                values={"": [metric.value or 0.0 for metric in bars]},
                upper_ends=[float(metric.detail["us_p90"]) for metric in bars],
            )
        )
    plot_bars(
        panels,
        report.output_path.with_suffix(".png"),
        f"Exchange with {NUM_HOSTS} hosts of one machine, without experts",
        "µs; line: to the 9th decile",
        report.metrics[0],
        is_logarithmic=True,
    )


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # nothing is computed here, and spinning threads would disturb
    with Report("dispatch_latency", arguments, ("pyzmq", "ray")) as report, start_peers() as peers:
        for num_tokens in NUM_TOKENS:
            report.progress(f"{num_tokens} tokens")
            measure_exchange(report, peers, num_tokens)
        if report.output_path is not None:
            plot(report)


if __name__ == "__main__":
    main()
