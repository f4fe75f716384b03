"""Processes that answer rows without computing anything: what a dispatch costs besides the experts.

    python -m benchmarks.answering tcp              a plain TCP server with TCP_NODELAY
    python -m benchmarks.answering frames KEY       a FrameServer; the holder of the public KEY may connect by TCP
    python -m benchmarks.answering unread KEY       the same, with answers written beforehand: the transport alone

Both answer a dispatch frame with int8 sums that were made beforehand. The frame server reads the frame and writes the
answer as a host does; the plain server knows how many bytes come and sends as many as the answer has.
"""

import argparse
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from cluster.machine import machine_id
from cluster.transport.codec import decode, encode
from cluster.transport.frames import CombineFrame, DispatchFrame, ProbeFrame
from cluster.transport.header import FrameLimits
from cluster.transport.row_format import Combine
from cluster.transport.server import FrameServer
from cluster.transport.sockets import HostAddress

LOCALHOST = "127.0.0.1"
SUMS = Combine("partial_sums", "int8")
LIMITS = FrameLimits()
_LENGTHS_BYTES = 16  # two numbers of 8 bytes open a connection to the plain server: bytes of a request, of an answer


def dispatch_frame(num_tokens: int, hidden_size: int, num_experts_each: int, seed: int = 0) -> DispatchFrame:
    """Make a frame of random int8 rows that asks for int8 sums.

    Args:
        num_tokens: rows of the frame.
        hidden_size: H.
        num_experts_each: experts of every row.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    num_pairs = num_tokens * num_experts_each
    return DispatchFrame(
        layer_index=0,
        epoch=0,
        rows=torch.randint(-127, 128, (num_tokens, hidden_size), generator=generator).to(torch.int8),
        scales=torch.rand(num_tokens, 1, generator=generator),
        expert_ids=torch.randint(0, 64, (num_pairs,), generator=generator),
        pairs_per_row=torch.full((num_tokens,), num_experts_each),
        expert_weights=torch.rand(num_pairs, generator=generator),
        combine=SUMS,
    )


def answer_frame(frame: DispatchFrame) -> CombineFrame:
    """Answer a frame with its own rows, as if they were sums."""
    return CombineFrame(frame.layer_index, frame.epoch, frame.rows, frame.scales)


class PreparedAnswers:
    """Answers frames with sums that were made beforehand, one set for each number of rows."""

    def __init__(self) -> None:
        self._prepared: dict[int, CombineFrame] = {}

    def answer(self, buffer: memoryview) -> bytes:
        """Read one frame and write the answer to it, as :meth:`cluster.expert_host.ExpertHost.answer`."""
        received = decode(buffer, LIMITS)
        frame = received.frame
        if not isinstance(frame, DispatchFrame):
            return encode(ProbeFrame(), received.request_id)
        num_rows, hidden_size = frame.rows.shape
        prepared = self._prepared.get(num_rows)
        if prepared is None:
            prepared = self._prepared[num_rows] = answer_frame(dispatch_frame(num_rows, hidden_size, 1, seed=1))
        answer = CombineFrame(frame.layer_index, frame.epoch, prepared.rows, prepared.scales)
        return encode(answer, received.request_id)


class UnreadAnswers:
    """Answers frames of a length as the first of that length was answered, without reading them."""

    def __init__(self) -> None:
        self._read = PreparedAnswers()
        self._answers: dict[int, bytes] = {}

    def answer(self, buffer: memoryview) -> bytes:
        """Return bytes that were written before."""
        answer = self._answers.get(len(buffer))
        if answer is None:
            answer = self._answers[len(buffer)] = self._read.answer(buffer)
        return answer


class TcpEcho:
    """A client of the plain server: sends a request and receives an answer of known length.

    Args:
        port: of the server on this machine.
        request: what is sent each time.
        answer_bytes: what comes back each time.
    """

    def __init__(self, port: int, request: bytes, answer_bytes: int) -> None:
        self._request, self._answer = request, bytearray(answer_bytes)
        self._socket = socket.create_connection((LOCALHOST, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(len(request).to_bytes(8, "little") + answer_bytes.to_bytes(8, "little"))

    def send(self) -> None:
        """Send the request."""
        self._socket.sendall(self._request)

    def receive(self) -> None:
        """Wait for the whole answer."""
        _receive_into(self._socket, memoryview(self._answer))

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


@contextmanager
def tcp_server() -> Iterator[int]:
    """Run a plain server in a process of its own; yields its port."""
    with _child("tcp") as said:
        yield int(said["port"])


@contextmanager
def frame_server(public_key: str, reads: bool = True) -> Iterator[HostAddress]:
    """Run a frame server in a process of its own, that reads frames or not; yields its address."""
    with _child("frames" if reads else "unread", public_key) as said:
        yield HostAddress(**said)


@contextmanager
def _child(*arguments: str) -> Iterator[dict[str, Any]]:
    """Run this module; yields what it says when it is ready. It ends when its standard input does."""
    # a key may begin with a dash: nothing is an option
    command = [sys.executable, "-m", "benchmarks.answering", "--", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()} before it was ready")
        yield json.loads(said)
    finally:
        process.stdin.close()
        process.wait()


def _receive_into(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill a buffer; ``False`` if the connection ends before."""
    num_received = 0
    while num_received < len(buffer):
        num_bytes = connection.recv_into(buffer[num_received:])
        if num_bytes == 0:
            return False
        num_received += num_bytes
    return True


def _serve_tcp() -> None:
    """Serve one connection after the other, until this process is ended."""
    with socket.create_server((LOCALHOST, 0)) as listener:
        _say({"port": listener.getsockname()[1]})
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _echo(connection)


def _echo(connection: socket.socket) -> None:
    lengths = bytearray(_LENGTHS_BYTES)
    _receive_into(connection, memoryview(lengths))
    request = memoryview(bytearray(int.from_bytes(lengths[:8], "little")))
    answer = bytes(int.from_bytes(lengths[8:], "little"))
    while _receive_into(connection, request):
        connection.sendall(answer)


def _say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("tcp", "frames", "unread"))
    parser.add_argument("key", nargs="?")
    arguments = parser.parse_args()
    if arguments.kind == "tcp":
        threading.Thread(target=_serve_tcp, daemon=True).start()
        sys.stdin.read()
        return
    answers = PreparedAnswers() if arguments.kind == "frames" else UnreadAnswers()
    server = FrameServer("device", answers.answer, LIMITS.max_frame_bytes, LOCALHOST, machine_id())
    with server:
        if arguments.key is not None:
            server.allow(arguments.key)
        _say(asdict(server.address))
        sys.stdin.read()


if __name__ == "__main__":
    main()
