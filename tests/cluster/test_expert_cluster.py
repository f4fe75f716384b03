import contextlib
import copy
import dataclasses
import signal
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from factories import ListCache, random_token_ids
from host_factories import model_of, place

from cluster.config import ClusterConfig
from cluster.host_fleet import hosted_devices
from cluster.joining import join_expert_hosts
from cluster.placement.cost import expected_bytes_per_token
from cluster.runtime import connect, start_expert_hosts
from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.errors import ClusterError, MoEBitNetError, PlacementError
from moe_bitnet.generation import generate

pytestmark = pytest.mark.ray

KIND = "base3"
EXACT = ClusterConfig(connect_timeout_s=60.0, combine="rows", retry_after_s=0.3)
SPREAD = [[0, 1, 2, 1, 0], [2, 2, 1, 2, 1]]  # the home holds nothing of layer 1
REPLICATED = [[[0], [1, 2], [2, 1], [1, 2], [0]], [[2, 1], [2, 1], [1, 2], [0], [1, 2]]]
TOKEN_IDS = random_token_ids(1, 7)
PROMPT = [5, 17, 2]


@pytest.fixture(scope="module", autouse=True)
def connected():
    with connect(ClusterConfig(num_cpus=1)):
        yield


@pytest.fixture(scope="module")
def model():
    return model_of(KIND, num_shared_experts=1)


def plan_for(model, devices_of_expert, num_devices, **changes):
    sizes = model_sizes(model.config, KIND)
    return place(devices_of_expert, num_devices, **{"expert_bytes": sizes.expert_bytes, **changes})


@contextlib.contextmanager
def running(model, devices_of_expert=SPREAD, num_devices=3, config=EXACT, checkpoint=None, on_progress=None, **changes):
    """Hosts, and the model with its experts there."""
    problem, placement = plan_for(model, devices_of_expert, num_devices, **changes)
    with start_expert_hosts(model, problem, placement, config, checkpoint, on_progress) as hosts:
        remote = copy.deepcopy(model)
        remote.replace_experts(hosts.executors)
        yield hosts, remote


@torch.inference_mode()
def logits_of(model, token_ids=TOKEN_IDS):
    return model(token_ids).logits


def text_of(model, num_tokens=40, **settings):
    return generate(model, PROMPT, max_new_tokens=num_tokens, cache=ListCache(2), **settings)


def process_of(hosts, name):
    return psutil.Process(hosts.hosts[name].call("process_id")())


def expert_processes():
    """Processes of all expert hosts of the Ray that was started here."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "ExpertHostActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def socket_folders():
    return set(Path(tempfile.gettempdir()).glob("moe-bitnet-*"))


# --- Start, work, end


def test_hosts_give_the_local_logits_tell_their_progress_and_leave_nothing_behind(model):
    expert_bytes = model_sizes(model.config, KIND).expert_bytes
    progress, folders = [], socket_folders()
    with running(model, on_progress=lambda *each: progress.append(each)) as (hosts, remote):
        for num_tokens in (1, 7, 33):
            token_ids = random_token_ids(1, num_tokens)
            assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))
        assert text_of(remote) == text_of(model)
        health = hosts.health()
        assert [each.held_bytes for each in health] == [2 * expert_bytes, 4 * expert_bytes, 4 * expert_bytes]
        assert all(each.is_up and each.round_trip_s < 1 for each in health)
        processes = expert_processes()
        assert len(processes) == 2, "the home's experts are in this process"
        assert len(socket_folders() - folders) == 2
        hosts.meter.reset()
        logits_of(remote, random_token_ids(8, 33))
        uniform = expected_bytes_per_token(hosts.placement, 2, 12, "int8", EXACT.returned).total_bytes
        assert hosts.meter.num_tokens == 8 * 33
        # the router of a random model is near uniform; exact bytes are compared where no Ray is needed
        assert hosts.meter.bytes_per_token(["payload", "metadata"]) == pytest.approx(uniform, rel=0.3)
    for name in ("device-1", "device-2"):
        steps = [loaded for device, loaded, _ in progress if device == name]
        assert steps == sorted(steps)
        assert steps[-1] == 4 * expert_bytes == max(total for device, _, total in progress if device == name)
    assert not psutil.wait_procs(processes, timeout=20)[1]
    assert socket_folders() <= folders


def test_hosts_read_a_checkpoint_themselves(model, tmp_path):
    save_model(model, tmp_path / "packed")
    with running(model, checkpoint=tmp_path / "packed") as (hosts, remote):
        assert torch.equal(logits_of(remote), logits_of(model))
        hosts.rebalance(plan_for(model, REPLICATED, 3)[1])
        assert torch.equal(logits_of(remote), logits_of(model))


def test_a_start_that_fails_says_why_and_leaves_no_host(model):
    """The problem understates the experts, so that only the host itself sees that they do not fit."""
    folders = socket_folders()
    with (
        pytest.raises(PlacementError, match=r"'device-1' holds .* bytes are missing"),
        running(model, [[1] * 5] * 2, 2, expert_bytes=1, memory_bytes=1000),
    ):
        raise AssertionError("started")
    assert not psutil.wait_procs(expert_processes(), timeout=20)[1]
    assert socket_folders() <= folders


def test_a_device_on_a_node_that_does_not_exist_is_an_error_at_once(model):
    problem, placement = plan_for(model, SPREAD, 3)
    devices = [Device(each.name, each.memory_bytes, node_id="f" * 56) for each in problem.topology.devices]
    lost = type(problem)(2, 5, problem.expert_bytes, 0, Topology(tuple(devices)))
    start_s = time.monotonic()
    with pytest.raises(ClusterError, match="none of the 1 nodes"), start_expert_hosts(model, lost, placement, EXACT):
        raise AssertionError("started")
    assert time.monotonic() - start_s < 5


def test_a_model_without_its_experts_is_refused(model):
    with running(model) as (_, remote):
        problem, placement = plan_for(model, SPREAD, 3)
        with pytest.raises(ClusterError, match="elsewhere already"), start_expert_hosts(remote, problem, placement):
            raise AssertionError("started")


# --- Changes while the model works


class Working:
    """Generates the same text over and over in a thread; every text is compared with the local one."""

    def __init__(self, model, remote):
        self.expected, self.remote = text_of(model, 12), remote
        self.num_texts, self.errors, self.is_over = 0, [], threading.Event()
        self.thread = threading.Thread(target=self.work)

    def work(self):
        while not self.is_over.is_set():
            try:
                text = text_of(self.remote, 12)
            except MoEBitNetError as error:  # it is shown by the test
                self.errors.append(error)
                return
            if text != self.expected:
                self.errors.append(text)
            self.num_texts += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()

    def wait_for_texts(self, count):
        target, deadline_s = self.num_texts + count, time.monotonic() + 60
        while self.num_texts < target and not self.errors and time.monotonic() < deadline_s:
            time.sleep(0.005)
        assert not self.errors


def test_tokens_stay_the_same_while_experts_move_and_devices_come_and_go(model):
    expert_bytes = model_sizes(model.config, KIND).expert_bytes
    with running(model) as (hosts, remote), Working(model, remote) as working:
        for epoch, (devices_of_expert, num_devices) in enumerate(
            [(REPLICATED, 3), ([[0] * 5] * 2, 1), ([[3, 1, 2, 3, 0], [2, 3, 1, 2, 3]], 4), ([[1, 1, 0, 1, 0]] * 2, 2)]
        ):
            problem, placement = plan_for(model, devices_of_expert, num_devices)
            hosts.rebalance(placement, problem)
            working.wait_for_texts(2)
            assert hosts.epoch == epoch + 1
            assert len(hosts.hosts) == num_devices - 1
            held = [each.held_bytes for each in hosts.health()]
            assert held == [
                expert_bytes * sum(len(placement.expert_ids_on(index, layer)) for layer in range(2))
                for index in range(num_devices)
            ]
        assert not working.errors


def test_hosts_come_and_go_by_number_of_devices(model):
    with running(model) as (hosts, remote), Working(model, remote) as working:
        for num_devices in (4, 1, 2):
            result = hosts.scale(logical_devices(5, 10**9), num_devices=num_devices)
            working.wait_for_texts(1)
            assert hosts.placement == result.placement
            assert hosts.placement.num_devices == num_devices
            assert list(hosts.hosts) == hosted_devices(hosts.placement)
        assert not working.errors


def test_a_change_that_fails_leaves_everything_as_it_was(model):
    expert_bytes = model_sizes(model.config, KIND).expert_bytes
    with running(model, memory_bytes=5 * expert_bytes) as (hosts, remote):
        before = hosts.health()
        # the new problem understates the experts, so that the host itself refuses them
        problem, placement = plan_for(model, [[1] * 5] * 2, 3, expert_bytes=1, memory_bytes=5 * expert_bytes)
        with pytest.raises(PlacementError, match="bytes are missing"):
            hosts.rebalance(placement, problem)
        moved = dataclasses.replace(hosts.placement, device_names=("device-1", "device-0", "device-2"))
        with pytest.raises(PlacementError, match="cannot move"):
            hosts.rebalance(moved)
        after = hosts.health()
        assert [each.held_bytes for each in after] == [each.held_bytes for each in before]
        assert hosts.epoch == 0
        assert torch.equal(logits_of(remote), logits_of(model))


@ray.remote(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}})
class Guest:
    """Another process with the model, on hosts that the test owns."""

    def __init__(self, invitation):
        self.model = model_of(KIND, num_shared_experts=1)
        self.stack = contextlib.ExitStack()
        joined = self.stack.enter_context(join_expert_hosts(self.model, invitation))
        self.model.replace_experts(joined.executors)

    def text(self):
        return text_of(self.model, 12)


def test_two_dispatchers_share_hosts_and_the_second_follows_a_change_of_plan(model):
    with running(model) as (hosts, remote), Working(model, remote) as working:
        guest = Guest.remote(hosts.invitation)
        assert ray.get(guest.text.remote(), timeout=60) == working.expected
        # device-3 gets a host after the guest has come: it must know the guest's key, too
        for devices_of_expert in (REPLICATED, [[3, 1, 2, 3, 0], [2, 3, 1, 2, 3]], SPREAD):
            num_devices = 4 if 3 in devices_of_expert[0] else 3
            problem, placement = plan_for(model, devices_of_expert, num_devices)
            hosts.rebalance(placement, problem)
            texts = [guest.text.remote() for _ in range(2)]
            working.wait_for_texts(2)
            assert ray.get(texts, timeout=60) == [working.expected] * 2
            assert [num_allowed_keys(host) for host in hosts.hosts.values()] == [2] * (num_devices - 1)
        ray.kill(guest)
        working.wait_for_texts(1)


def num_allowed_keys(host):
    return ray.get(host.actor.__ray_call__.remote(lambda actor: len(actor._server._allowed._keys)), timeout=60)


# --- Faults


@pytest.mark.parametrize("stage", ["between steps", "while it works", "after its answer"])
def test_a_killed_host_is_replaced_by_replicas_within_a_second(model, stage):
    with running(model, REPLICATED) as (hosts, remote):
        victim = process_of(hosts, "device-1")
        expected, killed_s = text_of(model), []

        def strike(step):
            if step == 10:
                if stage == "while it works":
                    victim.send_signal(signal.SIGSTOP)  # it surely has not answered when it dies
                    threading.Timer(0.1, kill).start()
                elif stage == "after its answer":
                    logits_of(remote)
                    kill()
                else:
                    kill()

        def kill():
            victim.kill()
            killed_s.append(time.monotonic())

        text, gaps = with_gaps(remote, strike)
        assert text == expected
        assert killed_s
        assert max(gaps) < 1
        assert not hosts.health()[1].is_up


def with_gaps(remote, strike):
    """Generate greedily, calling ``strike`` with the number of each step; returns the text and seconds of each step."""
    tokens, gaps, cache = list(PROMPT), [], ListCache(2)
    new = tokens
    with torch.inference_mode():
        for step in range(40):
            start_s = time.monotonic()
            strike(step)
            logits = remote(torch.tensor([new]), cache).logits
            new = [int(logits[0, -1].argmax())]
            tokens += new
            gaps.append(time.monotonic() - start_s)
    return tokens[len(PROMPT) :], gaps


def test_without_replicas_the_experts_are_loaded_elsewhere(model):
    with running(model) as (hosts, remote):
        expected = text_of(model)
        victim = process_of(hosts, "device-2")
        text, _ = with_gaps(remote, lambda step: victim.kill() if step == 10 else None)
        assert text == expected
        assert hosts.placement.device_names == ("device-0", "device-1")
        assert [each.device_name for each in hosts.health()] == ["device-0", "device-1"]


def test_a_thread_that_comes_late_to_a_recovery_goes_on_at_once(model):
    """Two threads miss the same host; while the first recovers, the second waits with what it saw before."""
    with running(model) as (hosts, remote):
        process_of(hosts, "device-2").kill()
        assert torch.equal(logits_of(remote), logits_of(model))
        start_s = time.monotonic()
        hosts._recover(hosts._dispatcher, ["device-2"])
        assert time.monotonic() - start_s < 1
        assert torch.equal(logits_of(remote), logits_of(model))


def test_without_room_elsewhere_the_host_is_started_again(model):
    expert_bytes = model_sizes(model.config, KIND).expert_bytes
    with running(model, memory_bytes=4 * expert_bytes) as (hosts, remote):
        victim = process_of(hosts, "device-2")
        victim.kill()
        assert torch.equal(logits_of(remote), logits_of(model))
        assert hosts.placement.device_names == ("device-0", "device-1", "device-2")
        assert process_of(hosts, "device-2").pid != victim.pid


def test_all_hosts_may_die_at_once(model):
    with running(model) as (hosts, remote):
        for name in hosts.hosts:
            process_of(hosts, name).kill()
        assert torch.equal(logits_of(remote), logits_of(model))


def test_a_slow_host_is_left_for_its_replica_and_asked_again_later(model):
    config = ClusterConfig(
        connect_timeout_s=60, combine="rows", request_timeout_s=0.3, retry_after_s=0.3, heartbeat_s=5
    )
    with running(model, REPLICATED, config=config) as (hosts, remote):
        process = process_of(hosts, "device-1")
        process.send_signal(signal.SIGSTOP)
        try:
            start_s = time.monotonic()
            assert torch.equal(logits_of(remote), logits_of(model))
            assert 0.3 <= time.monotonic() - start_s < 1.5
        finally:
            process.send_signal(signal.SIGCONT)
        deadline_s = time.monotonic() + 10
        while True:
            hosts.meter.reset()
            assert torch.equal(logits_of(remote), logits_of(model))
            if any(key.destination == "device-1" for key in hosts.meter.totals()):
                break
            assert time.monotonic() < deadline_s, "device-1 was not asked again"
            time.sleep(0.05)


def test_a_stopped_host_without_replicas_is_waited_for(model):
    config = ClusterConfig(connect_timeout_s=60, combine="rows", heartbeat_s=0.2, retry_after_s=0.2)
    with running(model, config=config) as (hosts, remote):
        process = process_of(hosts, "device-1")
        # stopped for longer than a heartbeat, and shorter than Ray is asked whether it lives
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.6, process.send_signal, [signal.SIGCONT]).start()
        assert torch.equal(logits_of(remote), logits_of(model))
        assert hosts.epoch == 0
        assert process.is_running()


def test_ctrl_c_in_a_step_leaves_the_hosts_usable(model):
    with running(model) as (_, remote):
        old_handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                text_of(remote, 10**6)
        finally:
            signal.signal(signal.SIGALRM, old_handler)
        assert torch.equal(logits_of(remote), logits_of(model))
