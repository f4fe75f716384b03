import dataclasses
import os
import signal
import threading
import time

import psutil
import pytest
import torch
import zmq
from transport_factories import (
    ELSEWHERE,
    HERE,
    LOOPBACK,
    HostProcess,
    Relay,
    dispatch_frame,
    double,
    doubled,
    serving,
    wait_until,
)

from cluster.config import ClusterConfig
from cluster.transport.codec import decode, encode
from cluster.transport.frames import CombineFrame, ProbeFrame
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.sockets import HostAddress, KeyPair
from moe_bitnet.errors import ClusterError, FrameError, HostDownError, StalePlanError

KEYS = KeyPair.generate()
TIMES = LinkTimes(connect_timeout_s=5, request_timeout_s=10, retry_after_s=0.05, heartbeat_s=0.3)
AT_ONCE_S = 0.25
"""Far below a heartbeat or a time-out, far above what a busy machine needs to notice a closed socket."""


@pytest.fixture(params=[HERE, ELSEWHERE], ids=["unix socket", "tcp and curve"])
def machine(request):
    return request.param


@pytest.fixture
def make_links():
    """Links that are closed at the end of the test."""
    made = []

    def make(*addresses, machine_id=HERE, limits=None, **times):
        links = HostLinks(machine_id, KEYS, limits or FrameLimits(), dataclasses.replace(TIMES, **times))
        made.append(links)
        links.set_addresses(addresses)
        return links

    yield make
    for links in made:
        links.close()


def ask(links, frame=None, name="host"):
    (answer,) = links.wait({name: links.send(name, frame or dispatch_frame())})
    assert answer.device_name == name
    return answer


def assert_works(links, name="host", seed=0):
    frame = dispatch_frame(7, 33, seed=seed)
    answer = ask(links, frame, name)
    assert answer.error is None
    assert torch.equal(answer.frame.rows, doubled(frame))


class Gate:
    """An answer that waits while it is closed."""

    def __init__(self):
        self._open = threading.Event()
        self._open.set()
        self.num_waiting = 0

    def close(self):
        self._open.clear()

    def open(self):
        self._open.set()

    def __call__(self, buffer):
        self.num_waiting += 1
        self._open.wait()
        self.num_waiting -= 1
        return double(buffer)


# --- Answers


def test_answers_come_in_any_order_and_belong_to_their_hosts(make_links, machine):
    gate = Gate()
    with serving(gate, [KEYS], "slow") as slow, serving(double, [KEYS], "quick") as quick:
        links = make_links(slow.address, quick.address, machine_id=machine)
        gate.close()
        frames = {name: dispatch_frame(7, 33, seed=seed) for seed, name in enumerate(("slow", "quick"))}
        answers = links.wait({name: links.send(name, frame) for name, frame in frames.items()})
        first = next(answers)
        gate.open()
        second = next(answers)
        assert (first.device_name, second.device_name) == ("quick", "slow")
        for answer in (first, second):
            assert torch.equal(answer.frame.rows, doubled(frames[answer.device_name]))
        assert not list(answers)
        assert links.is_encrypted("quick") == (machine == ELSEWHERE)


def test_many_answers_in_a_row_are_those_to_their_requests(make_links, machine):
    with serving(keys=[KEYS]) as server:
        links = make_links(server.address, machine_id=machine)
        for seed in range(100):
            assert_works(links, seed=seed)


def test_two_dispatchers_at_once_get_their_own_answers(machine):
    wrong, num_rounds = [], 100

    def dispatch(number, address):
        links = HostLinks(machine, KEYS, FrameLimits(), TIMES)  # its request ids are those of the others
        links.set_addresses([address])
        for index in range(num_rounds):
            frame = dispatch_frame(7, 33, seed=num_rounds * number + index)
            answer = ask(links, frame)
            if answer.frame is None or not torch.equal(answer.frame.rows, doubled(frame)):
                wrong.append((number, index, answer.error))
        links.close()

    with serving(keys=[KEYS]) as server:
        threads = [threading.Thread(target=dispatch, args=(number, server.address)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("error", "kind", "is_up"),
    [
        (StalePlanError("plan 4"), StalePlanError, True),
        (ClusterError("no such expert"), ClusterError, True),
        (ZeroDivisionError("oh"), ClusterError, True),
        (FrameError("no frame"), FrameError, False),
    ],
)
def test_a_refusal_comes_as_the_error_that_the_host_raised(make_links, error, kind, is_up):
    errors = [error]

    def answer(buffer):
        if errors and not isinstance(decode(buffer, FrameLimits()).frame, ProbeFrame):
            raise errors.pop()
        return double(buffer)

    with serving(answer, ip=None) as server:
        links = make_links(server.address)
        refused = ask(links)
        assert refused.frame is None
        assert type(refused.error) is kind
        assert str(error) in str(refused.error)
        assert links.is_up("host") == is_up
        wait_until(lambda: links.is_up("host"))  # a dropped connection is replaced by a new one
        assert_works(links)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no frame",
        encode(dispatch_frame()),
        encode(ProbeFrame()),
        encode(CombineFrame(3, 41, torch.ones(1, 1)))[:-1],
    ],
    ids=["nothing", "noise", "dispatch", "probe", "truncated"],
)
def test_an_answer_that_is_none_is_a_frame_error(make_links, answer):
    def answer_badly(buffer):
        request_id = decode(buffer, FrameLimits()).request_id
        if not answer.startswith(b"MoEf") or len(answer) == 35:
            return answer
        return encode(decode(answer, FrameLimits()).frame, request_id)

    with serving(answer_badly, ip=None) as server:
        assert isinstance(ask(make_links(server.address)).error, FrameError)


def test_an_answer_over_the_limits_is_not_taken(make_links):
    with serving(ip=None) as server:
        links = make_links(server.address, limits=FrameLimits(max_num_rows=3))
        assert ask(links, dispatch_frame(3)).frame is not None
        assert "rows: 4 given, the limit is 3" in str(ask(links, dispatch_frame(4)).error)


def test_a_frame_over_the_limit_is_not_sent_and_does_no_harm(make_links, machine):
    """The host would end the connection unread, and so seem to be down for ever."""
    frame = dispatch_frame(7, 33, "float32")
    num_bytes = len(encode(frame))
    with serving(keys=[KEYS], max_frame_bytes=num_bytes) as server:
        links = make_links(server.address, machine_id=machine, limits=FrameLimits(max_frame_bytes=num_bytes))
        assert ask(links, frame).frame is not None  # exactly at the limit
        with pytest.raises(ClusterError, match=f"limit is {num_bytes}. Run fewer tokens"):
            links.send("host", dispatch_frame(8, 33, "float32"))
        assert ask(links, frame).frame is not None


def test_a_probe_measures_the_round_trip(make_links, machine):
    with serving(keys=[KEYS]) as server:
        links = make_links(server.address, machine_id=machine)
        assert 0 < links.probe("host") < TIMES.connect_timeout_s
        assert_works(links)


def test_times_are_those_of_the_configuration():
    config = ClusterConfig(connect_timeout_s=1, request_timeout_s=2, retry_after_s=3, heartbeat_s=4)
    assert LinkTimes.of(config) == LinkTimes(1, 2, 3, 4)


# --- Hosts that are gone


def test_a_killed_host_is_noticed_at_once_by_unix_socket_and_by_tcp(make_links):
    host = HostProcess([KEYS], delay_s=30)
    try:
        both = [make_links(host.address, machine_id=machine_id, heartbeat_s=30) for machine_id in (HERE, ELSEWHERE)]
        for links in both:
            links.probe("host")
        requests = [links.send("host", dispatch_frame()) for links in both]
        time.sleep(0.05)  # the host is at work
        host.signal(signal.SIGKILL)
        start_s = time.monotonic()
        for links, request in zip(both, requests, strict=True):
            (answer,) = links.wait({"host": request})
            assert isinstance(answer.error, HostDownError)
            assert "is down (the connection ended)" in str(answer.error)
            assert not links.is_up("host")
        assert time.monotonic() - start_s < AT_ONCE_S
        start_s = time.monotonic()
        for links in both:
            assert isinstance(ask(links).error, HostDownError)
        assert time.monotonic() - start_s < AT_ONCE_S
    finally:
        host.close()


def test_a_stopped_host_is_noticed_within_a_heartbeat_and_comes_back_by_itself(make_links):
    host = HostProcess([KEYS])
    try:
        both = [make_links(host.address, machine_id=machine_id) for machine_id in (HERE, ELSEWHERE)]
        for links in both:
            links.probe("host")
        host.signal(signal.SIGSTOP)
        start_s = time.monotonic()
        requests = [links.send("host", dispatch_frame()) for links in both]
        for links, request in zip(both, requests, strict=True):
            (answer,) = links.wait({"host": request})
            assert isinstance(answer.error, HostDownError)
        assert 0.1 < time.monotonic() - start_s < TIMES.heartbeat_s + AT_ONCE_S
        deadline_s = time.monotonic() + 0.3
        while time.monotonic() < deadline_s:  # it is tried in vain, and nothing waits for it
            assert not any(links.is_up("host") for links in both)
            time.sleep(0.01)
        host.signal(signal.SIGCONT)
        for links in both:
            wait_until(lambda: links.is_up("host"))  # noqa: B023  called at once
            assert_works(links)
    finally:
        host.close()


def test_a_host_that_is_not_there_is_down_at_once(make_links, machine, tmp_path):
    address = HostAddress("host", HERE, f"ipc://{tmp_path}/none", f"tcp://{LOOPBACK}:1", KEYS.public)
    links = make_links(address, machine_id=machine)
    start_s = time.monotonic()
    answer = ask(links)
    assert isinstance(answer.error, HostDownError)
    assert "nothing listens there" in str(answer.error)
    with pytest.raises(HostDownError, match="nothing listens there"):
        links.probe("host")
    assert time.monotonic() - start_s < 2 * AT_ONCE_S
    assert not links.is_up("host")


def test_a_host_that_was_never_named_is_not_up(make_links):
    assert not make_links().is_up("host")


def test_a_host_that_starts_late_comes_up_by_itself(make_links, tmp_path):
    address = HostAddress("host", HERE, f"ipc://{tmp_path}/late", None, "")
    links = make_links(address)
    assert ask(links).frame is None
    assert not links.is_up("host")
    with serving(ip=None) as server:
        os.symlink(server.address.local_endpoint.removeprefix("ipc://"), tmp_path / "late")
        wait_until(lambda: links.is_up("host"))
        assert_works(links)


def test_a_host_that_restarts_at_a_new_address_is_found_there(make_links, machine):
    with serving(keys=[KEYS]) as server:
        links = make_links(server.address, machine_id=machine)
        assert_works(links)
    assert isinstance(ask(links).error, HostDownError)
    with serving(keys=[KEYS]) as server:
        links.set_addresses([server.address])
        assert links.is_up("host")
        assert_works(links)
        links.set_addresses([server.address])  # the same: the connection stays
        assert_works(links)
    links.set_addresses([])
    assert not links.is_up("host")


def test_one_lost_host_does_not_delay_the_others(make_links, machine):
    gate = Gate()
    with serving(keys=[KEYS], device_name="b") as other:
        with serving(gate, [KEYS], "a") as server:
            links = make_links(server.address, other.address, machine_id=machine)
            assert_works(links, "a")
            assert_works(links, "b")
        start_s = time.monotonic()
        requests = {name: links.send(name, dispatch_frame()) for name in ("a", "b")}
        answers = {answer.device_name: answer for answer in links.wait(requests)}
        assert time.monotonic() - start_s < AT_ONCE_S
        assert isinstance(answers["a"].error, HostDownError)
        assert answers["b"].frame is not None


def test_losing_and_finding_a_host_again_and_again_leaves_nothing_open(make_links):
    process = psutil.Process()
    with serving(keys=[KEYS]) as server, Relay(int(server.address.remote_endpoint.rpartition(":")[2])) as relay:
        address = dataclasses.replace(server.address, remote_endpoint=f"tcp://{LOOPBACK}:{relay.port}")
        links = make_links(address, machine_id=ELSEWHERE)
        for round_index in range(8):
            assert_works(links)
            if round_index == 1:
                wait_until(lambda: relay.num_connections <= 1)
                num_files = process.num_fds()
            relay.cut()
            assert isinstance(ask(links).error, HostDownError)
            relay.restore()
            wait_until(lambda: links.is_up("host"))
        assert_works(links)
        wait_until(lambda: process.num_fds() <= num_files)


# --- Slow hosts


def test_a_slow_host_is_down_and_its_late_answer_is_not_taken_for_another(make_links, machine):
    gate = Gate()
    with serving(gate, [KEYS]) as server:
        links = make_links(server.address, machine_id=machine, request_timeout_s=0.15)
        assert_works(links)
        gate.close()
        start_s = time.monotonic()
        answer = ask(links, dispatch_frame(7, 33, seed=1))
        assert 0.15 <= time.monotonic() - start_s < 0.15 + AT_ONCE_S
        assert isinstance(answer.error, HostDownError)
        assert "it did not answer in time" in str(answer.error)
        links.send("host", dispatch_frame(7, 33, seed=2))  # two late answers are on their way
        assert not links.is_up("host")
        gate.open()
        wait_until(lambda: links.is_up("host"))
        for seed in range(3, 8):
            assert_works(links, seed=seed)


def test_a_late_answer_that_is_there_already_is_passed_over(make_links, machine):
    with serving(keys=[KEYS]) as server:
        links = make_links(server.address, machine_id=machine)
        for seed in range(5):
            links.send("host", dispatch_frame(7, 33, seed=seed))  # nobody waits for these
        assert_works(links, seed=9)


def test_a_host_whose_round_trip_is_longer_than_the_time_to_the_next_try_comes_up(make_links):
    """A probe that is still on its way must not be given up for the next one."""

    def slowly(buffer):
        time.sleep(0.15)
        return double(buffer)

    with serving(slowly, ip=None) as server:
        links = make_links(server.address, request_timeout_s=0.05, retry_after_s=0.02)
        assert isinstance(ask(links).error, HostDownError)
        wait_until(lambda: links.is_up("host"), timeout_s=2)


def test_a_full_queue_is_a_loss_that_no_time_out_waits_for(make_links):
    gate = Gate()
    with serving(gate, ip=None, heartbeat_s=30) as server:
        links = make_links(server.address, heartbeat_s=30, retry_after_s=60)
        gate.close()
        big = dispatch_frame(200, 1000)
        for _ in range(100):
            links.send("host", big)
        start_s = time.monotonic()
        answer = ask(links, big)
        gate.open()
        assert "its queue is full" in str(answer.error)
        assert time.monotonic() - start_s < AT_ONCE_S


# --- Links that are cut


@pytest.fixture
def relayed(make_links):
    """Links to a host by a relay: ``(links, relay)``."""
    with serving(keys=[KEYS]) as server, Relay(int(server.address.remote_endpoint.rpartition(":")[2])) as relay:
        address = dataclasses.replace(server.address, remote_endpoint=f"tcp://{LOOPBACK}:{relay.port}")
        links = make_links(address, machine_id=ELSEWHERE)
        assert_works(links)
        yield links, relay


def test_a_link_that_is_cut_is_noticed_at_once_and_used_again_when_it_is_restored(relayed):
    links, relay = relayed
    relay.cut()
    start_s = time.monotonic()
    assert isinstance(ask(links).error, HostDownError)
    assert time.monotonic() - start_s < AT_ONCE_S
    for _ in range(10):
        assert not links.is_up("host")
        time.sleep(0.02)
    relay.restore()
    wait_until(lambda: links.is_up("host"))
    assert_works(links)


def test_a_link_that_swallows_everything_is_noticed_within_a_heartbeat(relayed):
    links, relay = relayed
    relay.silence()
    start_s = time.monotonic()
    answer = ask(links)
    assert isinstance(answer.error, HostDownError)
    assert 0.1 < time.monotonic() - start_s < TIMES.heartbeat_s + AT_ONCE_S
    relay.restore()
    wait_until(lambda: links.is_up("host"))
    assert_works(links)


def test_a_link_that_is_cut_within_an_answer_gives_no_part_of_it(make_links):
    gate = Gate()
    with serving(gate, [KEYS]) as server, Relay(int(server.address.remote_endpoint.rpartition(":")[2])) as relay:
        address = dataclasses.replace(server.address, remote_endpoint=f"tcp://{LOOPBACK}:{relay.port}")
        links = make_links(address, machine_id=ELSEWHERE)
        links.probe("host")
        gate.close()
        request = links.send("host", dispatch_frame(300, 1000))
        wait_until(lambda: gate.num_waiting == 1)
        relay.cut_after(100_000)
        gate.open()
        (answer,) = links.wait({"host": request})
        assert isinstance(answer.error, HostDownError)
        assert relay.from_target < 1_200_000
        relay.restore()
        wait_until(lambda: links.is_up("host"))
        assert_works(links)


def test_closing_ends_every_connection():
    with serving(keys=[KEYS]) as server:
        process = psutil.Process()
        num_files = process.num_fds()
        links = HostLinks(ELSEWHERE, KEYS, FrameLimits(), TIMES)
        links.set_addresses([server.address])
        assert_works(links)
        links.close()
        wait_until(lambda: process.num_fds() <= num_files)
        with pytest.raises(zmq.ZMQError):
            links.set_addresses([server.address])
