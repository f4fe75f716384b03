import pytest
import torch

from benchmarks.expert_processes import HEARTBEAT_S, LAYER, expert_hosts, full_store
from benchmarks.metrics import Metric
from benchmarks.traffic import contiguous
from benchmarks.traffic_plot import plot_traffic
from benchmarks.traffic_run import MODES, Workload, clustered_choices, make_steps, run_steps, uniform_choices
from cluster.placement.cost import routed_bytes
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.sockets import KeyPair
from moe_bitnet.errors import DataError

TOKENS_PER_STEP = 3


@pytest.fixture(scope="module")
def bench():
    """A home and one host, by the loopback."""
    keys = KeyPair.generate()
    with expert_hosts(["device-1"], keys.public, has_networks=False) as hosts:
        links = HostLinks("home", keys, FrameLimits(), LinkTimes(heartbeat_s=HEARTBEAT_S))
        links.set_addresses(hosts.addresses)
        yield full_store("device-0"), links, hosts
        links.close()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_run_and_weighs_what_its_routing_says(bench, mode):
    home, links, hosts = bench
    choices, placement, rules = uniform_choices(2 * TOKENS_PER_STEP, LAYER.top_k), contiguous(2), MODES[mode]
    run = run_steps(rules, placement, Workload("contiguous", choices, TOKENS_PER_STEP), home, links, hosts)
    expected = routed_bytes(
        torch.from_numpy(choices.layer(0).astype("int64")),
        placement,
        0,
        LAYER.hidden_size,
        rules.dispatch,
        rules.combine,
        rules.has_dedup,
    )
    assert run.logical_bytes == expected.total_bytes
    assert run.counted_bytes > run.logical_bytes
    assert run.wire is None
    assert run.crossed_bytes == run.counted_bytes


def test_one_device_sends_nothing(bench):
    home, links, hosts = bench
    workload = Workload("one device", uniform_choices(TOKENS_PER_STEP, 2), TOKENS_PER_STEP)
    run = run_steps(MODES["int8 both ways"], contiguous(1), workload, home, links, hosts)
    assert (run.counted_bytes, run.formula_bytes) == (0, 0)


def test_steps_hold_all_tokens_and_the_experts_that_were_chosen():
    workload = Workload("contiguous", uniform_choices(2 * TOKENS_PER_STEP, 4), TOKENS_PER_STEP)
    steps = make_steps(workload)
    assert [len(rows) for rows, _ in steps] == [TOKENS_PER_STEP, TOKENS_PER_STEP]
    indices = torch.cat([routing.expert_indices for _, routing in steps])
    assert torch.equal(indices, torch.from_numpy(workload.choices.layer(0).astype("int64")))


def test_what_is_learned_is_not_what_is_tested():
    learned, tested = clustered_choices(64, 32)
    assert (learned.num_tokens, tested.num_tokens) == (64, 32)
    assert not (learned.layer(0)[:32] == tested.layer(0)).all()


def test_a_drawing_is_made_from_metrics_alone(tmp_path):
    def metric(mode, size, placement="contiguous", wire=5.0):
        detail = {
            "mode": mode,
            "tokens_per_step": size,
            "devices": 2,
            "k": 8,
            "placement": placement,
            "hidden_size": 7,
            "experts": 9,
            "meter": 4.0,
            "formula": 3.0,
            "wire": wire,
        }
        return Metric("traffic.bytes_per_token", 5.0, "bytes", detail=detail)

    plain = [metric(mode, size) for mode in ("a", "b") for size in (1, 256)]
    plot_traffic([*plain, metric("b", 256, "by trace, clustered trace")], tmp_path / "traffic.png")
    assert (tmp_path / "traffic.png").stat().st_size > 0
    with pytest.raises(DataError, match="bytes_per_token"):
        plot_traffic([], tmp_path / "none.png")
