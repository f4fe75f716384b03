"""Frames, a host in a process of its own, and a TCP relay that can cut a link: for tests of the transport."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from cluster.transport.codec import decode, encode
from cluster.transport.frames import CombineFrame, DispatchFrame, ProbeFrame
from cluster.transport.header import FrameLimits
from cluster.transport.row_format import Combine
from cluster.transport.server import FrameServer
from cluster.transport.sockets import HostAddress, KeyPair

LOOPBACK = "127.0.0.1"
HERE, ELSEWHERE = "this machine", "another machine"
"""Machine ids: hosts of these tests are HERE, so a dispatcher ELSEWHERE reaches them by TCP and CURVE."""

DTYPES = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def rows_of(row_format, num_rows, hidden_size, seed=0):
    """Random rows and, for int8, their scales."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-128, 128, (num_rows, hidden_size), generator=generator).to(DTYPES[row_format])
    scales = torch.rand(num_rows, 1, generator=generator) if row_format == "int8" else None
    return rows, scales


def dispatch_frame(num_rows=3, hidden_size=7, row_format="int8", combine=None, pairs=(1, 2), seed=0, epoch=41):
    """A frame of layer 3 whose rows have numbers of experts taken in turn from ``pairs``."""
    combine = combine or Combine()
    rows, scales = rows_of(row_format, num_rows, hidden_size, seed)
    generator = torch.Generator().manual_seed(seed)
    pairs_per_row = torch.tensor([pairs[row % len(pairs)] for row in range(num_rows)], dtype=torch.int64)
    num_pairs = int(pairs_per_row.sum())
    expert_ids = torch.randint(0, 2**16, (num_pairs,), generator=generator)
    weights = torch.rand(num_pairs, generator=generator) if combine.mode == "partial_sums" else None
    return DispatchFrame(3, epoch, rows, scales, expert_ids, pairs_per_row, weights, combine)


def double(buffer):
    """The simplest host: answers the rows of a frame, dequantized and doubled, and probes."""
    received = decode(buffer, FrameLimits())
    frame = received.frame
    if isinstance(frame, ProbeFrame):
        return encode(frame, received.request_id)
    rows = CombineFrame(frame.layer_index, frame.epoch, frame.rows, frame.scales).values() * 2
    return encode(CombineFrame(frame.layer_index, frame.epoch, rows), received.request_id)


def doubled(frame):
    """What :func:`double` answers to a frame."""
    return CombineFrame(0, 0, frame.rows, frame.scales).values() * 2


@contextmanager
def serving(answer=double, keys=(), device_name="host", ip=LOOPBACK, **options):
    """A server in this process, on a Unix socket and, unless ``ip`` is None, on TCP for those with ``keys``."""
    options = {"max_frame_bytes": 2**20, "machine_id": HERE, **options}
    with FrameServer(device_name, answer, ip=ip, **options) as server:
        for each in keys:
            server.allow(each.public)
        yield server


class HostProcess:
    """A host that doubles rows in a process of its own, which may be stopped and killed.

    Args:
        keys: of dispatchers that may come by TCP.
        delay_s: before each answer.
    """

    def __init__(self, keys=(), delay_s=0.0):
        arguments = json.dumps({"keys": [each.public for each in keys], "delay_s": delay_s})
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, __file__, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        self._address = None

    @property
    def address(self):
        """Where it listens; waits until it does."""
        if self._address is None:
            self._address = HostAddress(**json.loads(self._process.stdout.readline()))
        return self._address

    def signal(self, number):
        self._process.send_signal(number)

    def close(self):
        """End the process, whatever state it is in."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.send_signal(signal.SIGCONT)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        folder = Path(self.address.local_endpoint.removeprefix("ipc://")).parent
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


class Relay:
    """Passes bytes between a TCP listener of its own and a target; counts them, holds them back, cuts the link.

    Attributes:
        port: to connect to.
        to_target, from_target: bytes passed on.
    """

    def __init__(self, target_port, host=LOOPBACK):
        self._target = (host, target_port)
        self._listener = socket.create_server((host, 0))
        self.port = self._listener.getsockname()[1]
        self.to_target = self.from_target = 0
        self._is_cut = self._is_silent = self._is_over = False
        self._last_byte = float("inf")
        self._pairs = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._is_over = True
        self._thread.join()
        self._end_pairs()
        self._listener.close()
        self._selector.close()

    def silence(self):
        """Swallow everything from now on, as a cable that was pulled out does."""
        self._is_silent = True

    def cut(self):
        """End all connections and take no new one."""
        self._is_cut = True

    def cut_after(self, num_bytes):
        """Cut the link when the target has sent so many more bytes."""
        self._last_byte = self.from_target + num_bytes

    def restore(self):
        """Work again; what was swallowed is lost."""
        self._is_silent = self._is_cut = False
        self._last_byte = float("inf")

    @property
    def num_connections(self):
        """Connections that pass through."""
        return len(self._pairs) // 2

    def _run(self):
        while not self._is_over:
            if self._is_cut or self.from_target >= self._last_byte:
                self._is_cut = True
                self._end_pairs()
            for key, _ in self._selector.select(0.01):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._pairs:
                    self._pass_on(key.fileobj)

    def _accept(self):
        near, _ = self._listener.accept()
        if self._is_cut:
            near.close()
            return
        far = socket.create_connection(self._target)
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[one] = (other, one is near)
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, source):
        destination, is_outward = self._pairs[source]
        try:
            chunk = source.recv(2**16)
            # counted first: whoever has received a message finds it counted
            self.to_target += len(chunk) if is_outward else 0
            self.from_target += 0 if is_outward else len(chunk)
            if chunk and not self._is_silent:
                destination.sendall(chunk)
        except OSError:
            chunk = b""
        if not chunk:
            self._end([source, destination])

    def _end_pairs(self):
        self._end(list(self._pairs))

    def _end(self, sockets):
        for each in sockets:
            self._pairs.pop(each, None)
            self._selector.unregister(each)
            each.close()


def wait_until(condition, timeout_s=5.0):
    """Wait for a condition; returns the seconds that it took, and fails if it does not come true."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "it did not happen in time"
        time.sleep(0.002)
    return time.monotonic() - start_s


def _serve(keys, delay_s):
    def answer(buffer):
        if isinstance(decode(buffer, FrameLimits()).frame, DispatchFrame):
            time.sleep(delay_s)
        return double(buffer)

    with serving(answer, [KeyPair(key, "") for key in keys]) as server:
        print(json.dumps(asdict(server.address)), flush=True)
        sys.stdin.read()  # until the parent closes it, or ends


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
