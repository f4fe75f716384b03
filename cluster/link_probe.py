"""Measure the link between two hosts over one TCP connection: latency by small echoes, bandwidth by a few MB.

A :class:`LinkProbeServer` listens on one host, :func:`measure_link` runs on the other; both know a random
token that reached them some other way. Neither side believes the other before it has proved that it knows
the token, which itself never crosses::

    server                                   client
    nonce_s (32)                        ─►
                                        ◄─   nonce_c (32), HMAC(token, "client" nonce_s nonce_c) (32)
    HMAC(token, "server" nonce_s nonce_c) ─►
                                        ◄─   kind u8, length u32, then ``length`` bytes
    the same bytes (echo), one byte (bulk) ─►      … as often as the client likes

Little endian, SHA-256. The server keeps nothing of what it receives, binds one address only, takes a few
connections at a time and ends by itself after ``timeout_s``.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from statistics import median
from types import TracebackType

from cluster.link import LinkSpeed
from moe_bitnet.errors import ClusterError, ConfigError

TOKEN_BYTES = 32
NUM_ECHOES = 31
ECHO_BYTES = 64
MAX_BULK_BYTES = 4 * 2**20
MAX_CONNECTIONS = 8

_NUM_BULKS = 5
_BULK_S = 0.25  # a bulk is made shorter where it would take longer than this
_MIN_BULK_BYTES = 64 * 2**10
_CHUNK_BYTES = 64 * 2**10
_MESSAGE_S = 5.0  # the longest that a server waits for one message
_POLL_S = 0.1
_MESSAGE = struct.Struct("<BI")
_ECHO, _BULK = 0, 1
_NONCE_BYTES = _PROOF_BYTES = 32


def new_token() -> bytes:
    """Return a random token for one server and its clients."""
    return secrets.token_bytes(TOKEN_BYTES)


class LinkProbeServer:
    """Answers probes until it is closed or its time is over; a context manager.

    Args:
        host: the address of this host in the cluster; the server is reached through no other.
        token: what clients must know, ``TOKEN_BYTES`` long.
        timeout_s: seconds after which the server ends by itself.

    Raises:
        ConfigError: ``host`` stands for all addresses, or the token has another length.
        ClusterError: the address is not one of this host's.
    """

    def __init__(self, host: str, token: bytes, timeout_s: float = 60.0) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ConfigError(f"link probe: host {host!r} stands for every address. Give the one of this node.")
        self._token = _checked(token)
        self._deadline = time.monotonic() + timeout_s
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family, backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise ClusterError(
                f"link probe: cannot listen on {host} ({error}). Give an address of this host."
            ) from error
        self._listener.settimeout(_POLL_S)
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="link-probe", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that the system chose."""
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Stop listening; a connection ends with its message, or after a few seconds without one."""
        self._is_closed.set()
        self._thread.join()

    def __enter__(self) -> "LinkProbeServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _is_over(self) -> bool:
        return self._is_closed.is_set() or time.monotonic() >= self._deadline

    def _accept(self) -> None:
        with self._listener:
            while not self._is_over:
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # nobody came, or came and went
                    continue
                if not self._places.acquire(blocking=False):
                    connection.close()
                    continue
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            # a peer that goes away or breaks the protocol ends its own connection and nothing else
            with connection, contextlib.suppress(OSError, EOFError, ValueError):
                channel = _Channel(connection)
                channel.deadline = self._message_deadline()
                _prove_as_server(channel, self._token)
                buffer = bytearray(_CHUNK_BYTES)
                while not self._is_over:
                    channel.deadline = self._message_deadline()
                    _answer(channel, buffer)
        finally:
            self._places.release()

    def _message_deadline(self) -> float:
        return min(self._deadline, time.monotonic() + _MESSAGE_S)


def measure_link(
    host: str, port: int, token: bytes, timeout_s: float = 5.0, source_host: str | None = None
) -> LinkSpeed:
    """Measure the way to a :class:`LinkProbeServer`.

    Args:
        host: where the server listens.
        port: the same.
        token: what the server was given.
        timeout_s: seconds for everything.
        source_host: address of this host to send from; ``None`` lets the system choose.
    Returns:
        Half the median time of an echo as the latency, and the payload bandwidth of the fastest of a few bulks of
        at most ``MAX_BULK_BYTES`` from here to the server. Bulks are short: a link whose window must grow for
        longer than they last (long distance, above about 1 GB/s × 10 ms) is faster than it seems.
    Raises:
        ClusterError: nobody answers in time, or the peer does not know the token.
    """
    _checked(token)
    source = None if source_host is None else (source_host, 0)
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout_s, source) as connection:
            channel = _Channel(connection, deadline)
            _prove_as_client(channel, token)
            echo_s = median(_exchange(channel, _ECHO, ECHO_BYTES) for _ in range(NUM_ECHOES))
            return LinkSpeed(_bandwidth(channel, echo_s), echo_s / 2)
    except (OSError, EOFError) as error:
        raise ClusterError(
            f"link probe: {host}:{port} did not answer as a probe with our token within {timeout_s:g} s ({error}). "
            f"Check that the hosts reach each other, or give the links in a topology file."
        ) from error


class _Channel:
    """A connection on which every step ends at a deadline."""

    def __init__(self, connection: socket.socket, deadline: float = 0.0) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.deadline = deadline

    def send(self, data: bytes | memoryview) -> None:
        self._limit_time()
        self._connection.sendall(data)

    def receive(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        self.receive_into(memoryview(data))
        return bytes(data)

    def receive_into(self, view: memoryview) -> None:
        while view:
            self._limit_time()
            count = self._connection.recv_into(view)
            if count == 0:
                raise EOFError("it closed the connection")
            view = view[count:]

    def _limit_time(self) -> None:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the time is over")
        self._connection.settimeout(remaining)


def _bandwidth(channel: _Channel, echo_s: float) -> float:
    """Return bytes a second; the first bulk opens TCP's window and tells how long the others may be."""
    first_s = _exchange(channel, _BULK, _MIN_BULK_BYTES)
    affordable = int(_MIN_BULK_BYTES * _BULK_S / first_s)
    num_bytes = min(MAX_BULK_BYTES, max(_MIN_BULK_BYTES, affordable))
    # what else the hosts do only slows it, so the fastest tells most of the link
    seconds = min(_exchange(channel, _BULK, num_bytes) for _ in range(_NUM_BULKS))
    # the last byte's way and the answer's are latency; at least half of the time is not
    return num_bytes / max(seconds - echo_s, seconds / 2)


def _exchange(channel: _Channel, kind: int, num_bytes: int) -> float:
    """Send one message and wait for its answer; returns the seconds of both."""
    message = _MESSAGE.pack(kind, num_bytes) + bytes(num_bytes)
    start = time.perf_counter()
    channel.send(message)
    channel.receive(num_bytes if kind == _ECHO else 1)
    return time.perf_counter() - start


def _answer(channel: _Channel, buffer: bytearray) -> None:
    kind, num_bytes = _MESSAGE.unpack(channel.receive(_MESSAGE.size))
    if kind == _ECHO and num_bytes <= ECHO_BYTES:
        channel.send(channel.receive(num_bytes))
    elif kind == _BULK and num_bytes <= MAX_BULK_BYTES:
        for start in range(0, num_bytes, _CHUNK_BYTES):
            channel.receive_into(memoryview(buffer)[: min(_CHUNK_BYTES, num_bytes - start)])
        channel.send(b"\1")
    else:
        raise ValueError("not a message of this protocol")


def _prove_as_server(channel: _Channel, token: bytes) -> None:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    channel.send(nonce)
    nonces = nonce + channel.receive(_NONCE_BYTES)
    if not hmac.compare_digest(channel.receive(_PROOF_BYTES), _proof(token, b"client", nonces)):
        raise ValueError("the client does not know the token")
    channel.send(_proof(token, b"server", nonces))


def _prove_as_client(channel: _Channel, token: bytes) -> None:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    nonces = channel.receive(_NONCE_BYTES) + nonce
    channel.send(nonce + _proof(token, b"client", nonces))
    if not hmac.compare_digest(channel.receive(_PROOF_BYTES), _proof(token, b"server", nonces)):
        raise EOFError("it does not know the token")


def _proof(token: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token, role + nonces, "sha256")


def _checked(token: bytes) -> bytes:
    if not isinstance(token, bytes) or len(token) != TOKEN_BYTES:
        raise ConfigError(f"link probe: the token must be {TOKEN_BYTES} bytes. Make one with new_token().")
    return token
