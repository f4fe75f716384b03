import logging
import os
import stat
import threading
from pathlib import Path

import psutil
import pytest
import torch
import zmq
from transport_factories import (
    ELSEWHERE,
    HERE,
    LOOPBACK,
    Relay,
    dispatch_frame,
    double,
    doubled,
    serving,
    wait_until,
)

from cluster.transport.codec import decode, encode
from cluster.transport.frames import RefusalFrame
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.server import FrameServer
from cluster.transport.sockets import KeyPair, remove_socket_folder
from moe_bitnet.errors import ClusterError, ConfigError, HostDownError, StalePlanError

TIMES = LinkTimes(connect_timeout_s=5, request_timeout_s=5, retry_after_s=0.1)
SECOND_LOOPBACK = "127.0.0.2"


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


def dealer(context, endpoint, server_key=None, keys=None):
    """A socket that knows nothing of this package, with CURVE if it has keys."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        socket.curve_serverkey = server_key.encode()
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
    socket.connect(endpoint)
    return socket


def folder_of(server):
    return Path(server.address.local_endpoint.removeprefix("ipc://")).parent


class Counting:
    """An answer that counts how often it was asked for."""

    def __init__(self):
        self.num_frames = 0

    def __call__(self, buffer):
        self.num_frames += 1
        return double(buffer)


# --- Who may come


def ask(server, keys, machine_id=ELSEWHERE, frame=None, times=TIMES):
    """Ask a server once, in the way of this package; returns the answer."""
    links = HostLinks(machine_id, keys, FrameLimits(), times)
    try:
        links.set_addresses([server.address])
        frame = frame or dispatch_frame()
        (answer,) = links.wait({"host": links.send("host", frame)})
        return answer
    finally:
        links.close()


def test_a_peer_with_an_allowed_key_is_answered_and_the_connection_is_encrypted():
    keys, answer, frame = KeyPair.generate(), Counting(), dispatch_frame(7, 33, "float32")
    with serving(answer, [keys]) as server:
        assert torch.equal(ask(server, keys, frame=frame).frame.rows, doubled(frame))
        assert answer.num_frames == 1


def test_a_peer_without_an_allowed_key_cannot_send_a_row(caplog):
    known, unknown, answer = KeyPair.generate(), KeyPair.generate(), Counting()
    with serving(answer, [known]) as server, caplog.at_level(logging.WARNING):
        refused = ask(server, unknown)
        assert isinstance(refused.error, HostDownError)
        assert "does not know this process's key" in str(refused.error)
        assert ask(server, known).frame is not None
        assert answer.num_frames == 1
    assert "a peer without an allowed key was refused" in caplog.text


def test_a_peer_with_the_public_key_of_another_but_not_its_secret_cannot_send_a_row():
    known, unknown, answer = KeyPair.generate(), KeyPair.generate(), Counting()
    with serving(answer, [known]) as server:
        assert ask(server, KeyPair(known.public, unknown.secret), times=LinkTimes(request_timeout_s=0.3)).frame is None
        assert answer.num_frames == 0


def test_a_host_that_is_not_the_one_expected_gets_no_row():
    """Whoever took over an address has not the key of the host that was there."""
    keys, answer = KeyPair.generate(), Counting()
    with serving(answer, [keys]) as server, serving(keys=[keys]) as other:
        server.address = type(server.address)(**{**vars(server.address), "public_key": other.address.public_key})
        assert isinstance(ask(server, keys, times=LinkTimes(request_timeout_s=0.3)).error, HostDownError)
        assert answer.num_frames == 0


def test_a_key_that_is_allowed_later_lets_its_holder_in():
    keys, answer = KeyPair.generate(), Counting()
    with serving(answer) as server:
        assert ask(server, keys).frame is None
        server.allow(keys.public)
        assert ask(server, keys).frame is not None
        assert answer.num_frames == 1


@pytest.mark.parametrize("mechanism", ["none", "plain"])
def test_a_peer_that_does_not_encrypt_cannot_send_a_row(context, mechanism):
    answer = Counting()
    with serving(answer) as server, dealer(context, server.address.remote_endpoint) as socket:
        if mechanism == "plain":
            socket.plain_username, socket.plain_password = b"moe", b"bitnet"
            socket.connect(server.address.remote_endpoint)
        for _ in range(5):
            socket.send(encode(dispatch_frame()))
        assert not socket.poll(300)
        assert answer.num_frames == 0


def test_rows_and_names_do_not_cross_the_network_in_the_clear():
    keys, seen = KeyPair.generate(), bytearray()
    frame = dispatch_frame(7, 33, "float32")

    class Listening(Relay):
        def _pass_on(self, source):
            seen.extend(source.recv(2**16, 2))  # MSG_PEEK
            super()._pass_on(source)

    with serving(keys=[keys]) as server, Listening(int(server.address.remote_endpoint.rpartition(":")[2])) as relay:
        address = {**vars(server.address), "remote_endpoint": f"tcp://{LOOPBACK}:{relay.port}"}
        server.address = type(server.address)(**address)
        assert ask(server, keys, frame=frame).frame is not None
    assert len(seen) > len(encode(frame))
    for secret in (b"MoEf", frame.rows[0].numpy().tobytes()[:16], keys.secret.encode()):
        assert secret not in seen


# --- Where it listens


def listening_addresses():
    return {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}


def test_tcp_listens_only_at_the_address_given():
    before = listening_addresses()
    assert SECOND_LOOPBACK not in before
    with serving(ip=SECOND_LOOPBACK) as server:
        assert listening_addresses() == before | {SECOND_LOOPBACK}
        assert server.address.remote_endpoint.startswith(f"tcp://{SECOND_LOOPBACK}:")
    assert listening_addresses() == before


def test_without_an_address_nothing_listens_for_the_network():
    process = psutil.Process()
    before = len(process.net_connections("inet"))
    with serving(ip=None) as server:
        assert server.address.remote_endpoint is None
        assert len(process.net_connections("inet")) == before
        assert ask(server, KeyPair.generate(), HERE).frame is not None


def test_ipv6_is_spoken():
    if not Path("/proc/net/if_inet6").exists() or "lo" not in Path("/proc/net/if_inet6").read_text():
        pytest.skip("needs IPv6 on the loopback interface")
    keys = KeyPair.generate()
    with serving(keys=[keys], ip="::1") as server:
        assert server.address.remote_endpoint.startswith("tcp://[::1]:")
        assert ask(server, keys).frame is not None


@pytest.mark.parametrize("ip", ["0.0.0.0", "::", "*", "", "eth0", "127.0.0.1:80"])
def test_what_is_not_the_address_of_one_interface_is_refused(ip):
    with pytest.raises(ConfigError, match="FrameServer: ip"):
        FrameServer("host", double, 1000, ip)


def test_an_address_of_another_machine_is_refused_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    num_threads = threading.active_count()
    with pytest.raises(ClusterError, match=r"'host' cannot listen at .* and 192\.0\.2\.1"):
        FrameServer("host", double, 1000, "192.0.2.1")
    assert not list(tmp_path.iterdir())
    wait_until(lambda: threading.active_count() <= num_threads)


def test_a_folder_with_too_long_a_path_is_named(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(ClusterError, match="shorter TMPDIR"):
        FrameServer("host", double, 1000)


def test_the_socket_is_for_its_owner_alone_and_gone_after_the_end():
    with serving() as server:
        folder = folder_of(server)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()
        assert len(list(folder.iterdir())) == 1
    assert not folder.exists()


def test_what_a_killed_host_left_is_removed_on_its_own_machine_alone(tmp_path, monkeypatch):
    with serving() as server:
        folder, address = folder_of(server), server.address
        remove_socket_folder(address, ELSEWHERE)
        assert folder.exists()
        remove_socket_folder(address, HERE)
        assert not folder.exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    remove_socket_folder(type(address)("host", HERE, f"ipc://{precious}/1", None, ""), HERE)
    assert precious.exists()


def test_a_server_that_was_not_started_can_be_stopped():
    server = FrameServer("host", double, 1000)
    server.stop()
    assert not folder_of(server).exists()


def test_no_thread_and_no_file_stays_open_after_the_end():
    keys, process = KeyPair.generate(), psutil.Process()
    for is_first in (True, False):
        with serving(keys=[keys]) as server:
            ask(server, keys)
            ask(server, keys, HERE)
        if is_first:
            num_files, num_threads = process.num_fds(), process.num_threads()
    assert process.num_fds() <= num_files
    wait_until(lambda: process.num_threads() <= num_threads)


def test_no_secret_is_shown():
    with serving() as server:
        secret = server._keys.secret
        assert secret not in repr(server) + repr(server.address) + repr(server._keys)


# --- What it answers


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (StalePlanError("plan 4"), "stale plan", "plan 4"),
        (ClusterError("no such expert"), "request", "no such expert"),
        (ConfigError("bad"), "request", "bad"),
        (ZeroDivisionError("oh"), "failure", "ZeroDivisionError: oh"),
        (MemoryError(), "failure", "MemoryError: "),
        (ValueError("\ud800"), "failure", "ValueError: ?"),
    ],
)
def test_an_error_is_told_to_the_peer_and_the_connection_stays(context, error, reason, message):
    errors = [error]

    def answer(buffer):
        if errors:
            raise errors.pop()
        return double(buffer)

    with serving(answer, ip=None) as server, dealer(context, server.address.local_endpoint) as socket:
        socket.send(encode(dispatch_frame(), 17))
        received = decode(socket.recv(), FrameLimits())
        assert received.request_id == 17
        assert (received.frame.reason, received.frame.message) == (reason, message)
        socket.send(encode(dispatch_frame(), 18))
        assert decode(socket.recv(), FrameLimits()).request_id == 18


def test_bytes_that_are_no_frame_end_the_connection_that_sent_them_and_no_other(context):
    with (
        serving(ip=None) as server,
        dealer(context, server.address.local_endpoint) as honest,
        dealer(context, server.address.local_endpoint) as bad,
    ):
        good = encode(dispatch_frame(), 5)
        for socket in (honest, bad):
            socket.send(good)
            assert decode(socket.recv(), FrameLimits()).request_id == 5
        bad.send(good[:-1])
        refusal = decode(bad.recv(), FrameLimits())
        assert isinstance(refusal.frame, RefusalFrame)
        assert (refusal.frame.reason, refusal.request_id) == ("protocol", 5)
        bad.send(good)
        honest.send(good)
        assert honest.poll(1000)
        assert not bad.poll(100)
