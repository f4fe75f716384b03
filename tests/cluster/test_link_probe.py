import contextlib
import socket
import threading
import time

import pytest

from cluster.link_probe import (
    ECHO_BYTES,
    MAX_BULK_BYTES,
    MAX_CONNECTIONS,
    TOKEN_BYTES,
    LinkProbeServer,
    _Channel,
    _prove_as_client,
    measure_link,
    new_token,
)
from moe_bitnet.errors import ClusterError, ConfigError

HOST = "127.0.0.1"


@pytest.fixture
def token():
    return new_token()


@pytest.fixture
def server(token):
    with LinkProbeServer(HOST, token, timeout_s=30) as server:
        yield server


def answer_to(connection, data):
    """Send ``data`` and nothing more; returns all that comes back before the server hangs up."""
    received = b""
    with contextlib.suppress(ConnectionError, OSError):  # it hung up before it had read everything
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(4096):
            received += chunk
    return received


def test_a_link_has_a_latency_and_a_bandwidth(server, token):
    speed = measure_link(HOST, server.port, token, timeout_s=20, source_host=HOST)
    assert 1e-6 < speed.latency_s < 0.1  # loopback, on a machine that may be busy
    assert 1e6 < speed.bandwidth_bytes_per_s < 1e12


class Delay:
    """A relay that holds every piece back for ``delay_s`` in each direction, and passes ``rate`` bytes a second."""

    def __init__(self, port, delay_s, rate):
        self.delay_s, self.rate, self.target = delay_s, rate, port
        self.listener = socket.create_server((HOST, 0))
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.run, daemon=True)]
        self.threads[0].start()

    def run(self):
        with self.listener:
            near, _ = self.listener.accept()
        far = socket.create_connection((HOST, self.target))
        other = threading.Thread(target=self.relay, args=(far, near), daemon=True)
        other.start()
        self.relay(near, far)
        other.join()
        near.close(), far.close()

    def relay(self, source, destination):
        try:
            while piece := source.recv(16384):
                time.sleep(self.delay_s + len(piece) / self.rate)
                destination.sendall(piece)
            destination.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def test_a_slow_and_distant_link_is_measured_as_such(server, token):
    speed = measure_link(HOST, Delay(server.port, delay_s=0.005, rate=1e6).port, token, timeout_s=20)
    assert 0.005 <= speed.latency_s < 0.02
    assert 2e5 < speed.bandwidth_bytes_per_s < 1.1e6


def test_several_clients_are_answered_at_a_time(server, token):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(measure_link(HOST, server.port, token, timeout_s=20)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3


def test_a_client_without_the_token_is_refused_before_it_can_send(server, token):
    with pytest.raises(ClusterError, match="closed the connection"):
        measure_link(HOST, server.port, new_token(), timeout_s=5)
    with socket.create_connection((HOST, server.port), timeout=10) as connection:
        assert len(connection.recv(32, socket.MSG_WAITALL)) == 32  # the nonce
        assert answer_to(connection, bytes(64) + b"\x00\x04\x00\x00\x00echo") == b""
    measure_link(HOST, server.port, token, timeout_s=20)  # the others are served


def test_a_server_without_the_token_is_refused(token):
    """A stranger that accepts anything learns a proof that is of no use to it, and is not measured."""
    with socket.create_server((HOST, 0)) as listener:

        def pretend():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(32))
                connection.recv(64, socket.MSG_WAITALL)
                connection.sendall(bytes(32))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ClusterError, match="does not know the token"):
            measure_link(HOST, listener.getsockname()[1], token, timeout_s=5)
        thread.join()


@pytest.mark.parametrize(
    "message",
    [
        b"\x02" + (4).to_bytes(4, "little") + b"echo",  # no such kind
        b"\x00" + (ECHO_BYTES + 1).to_bytes(4, "little") + bytes(ECHO_BYTES + 1),
        b"\x01" + (MAX_BULK_BYTES + 1).to_bytes(4, "little") + b"long",
        b"\x01\xff",  # ends in the middle
    ],
)
def test_a_message_beyond_the_protocol_ends_its_connection_alone(server, token, message):
    with socket.create_connection((HOST, server.port), timeout=10) as connection:
        _prove_as_client(_Channel(connection, time.monotonic() + 10), token)
        assert answer_to(connection, message) == b""
    measure_link(HOST, server.port, token, timeout_s=20)


def test_silent_connections_keep_their_places_and_no_more(server, token):
    silent = [socket.create_connection((HOST, server.port)) for _ in range(MAX_CONNECTIONS)]
    assert all(len(connection.recv(32)) == 32 for connection in silent)
    with pytest.raises(ClusterError, match=str(server.port)):
        measure_link(HOST, server.port, token, timeout_s=5)
    for connection in silent:
        connection.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            measure_link(HOST, server.port, token, timeout_s=5)
            break
        except ClusterError:
            assert time.monotonic() < deadline


def test_a_probe_ends_in_time_where_nobody_answers(token):
    with socket.create_server((HOST, 0)) as deaf:
        start = time.monotonic()
        with pytest.raises(ClusterError, match=r"within 0\.3 s"):
            measure_link(HOST, deaf.getsockname()[1], token, timeout_s=0.3)
        assert time.monotonic() - start < 2
        port = deaf.getsockname()[1]
    with pytest.raises(ClusterError, match="topology file"):
        measure_link(HOST, port, token, timeout_s=5)  # nobody listens


def test_a_server_ends_by_itself(token):
    server = LinkProbeServer(HOST, token, timeout_s=0.2)
    port = server.port
    server._thread.join(timeout=5)
    assert not server._thread.is_alive()
    with pytest.raises(ClusterError):
        measure_link(HOST, port, token, timeout_s=1)


def test_a_server_binds_one_address_and_needs_a_whole_token(token):
    for host in ("", "0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="every address"):
            LinkProbeServer(host, token)
    with pytest.raises(ClusterError, match="cannot listen on"):
        LinkProbeServer("198.51.100.7", token)
    with pytest.raises(ConfigError, match=f"{TOKEN_BYTES} bytes"):
        LinkProbeServer(HOST, b"short")
    with pytest.raises(ConfigError, match=f"{TOKEN_BYTES} bytes"):
        measure_link(HOST, 1, b"short")
