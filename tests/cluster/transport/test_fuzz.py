"""A host is fed what no honest dispatcher sends; each is refused, and an honest dispatcher beside notices nothing."""

import dataclasses
import random
import socket
import struct
import zlib
from contextlib import ExitStack, contextmanager

import psutil
import pytest
import torch
import zmq
from host_factories import EXACT, experts_of, frame_for, host_for, local_rows, model_of, random_choices
from transport_factories import ELSEWHERE, HERE, LOOPBACK, dispatch_frame, serving

from cluster.transport.codec import decode, encode
from cluster.transport.frames import CombineFrame, ProbeFrame, RefusalFrame
from cluster.transport.header import FrameLimits
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.row_format import Combine
from cluster.transport.sockets import KeyPair

ALL_EXPERTS = [0, 1, 2, 3, 4]
MAX_FRAME_BYTES = 2**16
NUM_RANDOM = 60


class Honest:
    """A dispatcher that keeps one connection, asks again and again, and checks every bit of the answers."""

    def __init__(self, server, model, machine_id, keys):
        self._links = HostLinks(machine_id, keys, FrameLimits(), LinkTimes(request_timeout_s=5))
        self._links.set_addresses([server.address])
        hidden_states = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
        choices = random_choices(7, 5, top_k=2)
        self.frame, slots = frame_for(hidden_states, choices, ALL_EXPERTS, "int8", combine=EXACT)
        self._expected = local_rows(experts_of(model), hidden_states, choices)[slots]
        self.num_answers = 0

    def check(self):
        (answer,) = self._links.wait({"host": self._links.send("host", self.frame)})
        assert answer.error is None
        assert torch.equal(answer.frame.rows, self._expected)
        self.num_answers += 1

    def close(self):
        self._links.close()


class Attack:
    """A host with real experts, an honest dispatcher, and the means to misbehave beside it."""

    def __init__(self, is_remote, **options):
        self._stack = ExitStack()
        model, self._keys = model_of("2bit"), KeyPair.generate()
        answer = host_for(model, ALL_EXPERTS).answer
        options = {"max_frame_bytes": MAX_FRAME_BYTES, **options}
        self._server = self._stack.enter_context(serving(answer, [self._keys], **options))
        self._context = self._stack.enter_context(zmq.Context())
        self._is_remote = is_remote
        self.honest = Honest(self._server, model, ELSEWHERE if is_remote else HERE, self._keys)
        self._stack.callback(self.honest.close)
        self.honest.check()
        self.good = encode(self.honest.frame, 99)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.honest.check()
        self._stack.close()

    @contextmanager
    def connection(self):
        """A connection with all the rights of a dispatcher."""
        address = self._server.address
        with self._context.socket(zmq.DEALER) as each:
            each.linger = 0
            if self._is_remote:
                each.curve_serverkey = address.public_key.encode()
                each.curve_publickey, each.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
            each.connect(address.remote_endpoint if self._is_remote else address.local_endpoint)
            yield each

    def raw_connection(self):
        """A plain socket to the same place."""
        address = self._server.address
        if self._is_remote:
            return socket.create_connection((LOOPBACK, int(address.remote_endpoint.rpartition(":")[2])))
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(address.local_endpoint.removeprefix("ipc://"))
        return raw

    def expect_refusal(self, *parts):
        """Send a message on a connection of its own: it must be refused, and the connection be dropped."""
        with self.connection() as bad:
            bad.send_multipart(parts)
            assert bad.poll(5000), parts
            frame = decode(bad.recv(), FrameLimits()).frame
            assert isinstance(frame, RefusalFrame), parts
            assert frame.reason == "protocol", parts
            bad.send(self.good)  # it must not be heard: whatever the honest one sends later is answered first
            self.honest.check()
            assert not bad.poll(0), parts


@pytest.fixture(params=["unix socket", "tcp and curve"])
def attack(request):
    with Attack(request.param == "tcp and curve") as attack:
        yield attack


def greedy_frame(num_rows=500, hidden_size=12):
    """Small rows with 100 experts each, all of whose outputs are to come back."""
    frame = dispatch_frame(num_rows, hidden_size, "int8", Combine("rows", "float32"), pairs=(100,), epoch=0)
    return dataclasses.replace(frame, layer_index=0, expert_ids=frame.expert_ids % 5)


def greedy_answer_bytes(frame):
    return 4 * frame.rows.shape[1] * len(frame.expert_ids)


def resealed(frame):
    """The same bytes with a right checksum."""
    return frame[:28] + struct.pack("<I", zlib.crc32(frame[32:], zlib.crc32(frame[:28]))) + frame[32:]


def test_truncated_frames(attack):
    for length in (0, 1, 31, 32, 33, len(attack.good) - 1):
        attack.expect_refusal(attack.good[:length])
        attack.expect_refusal(resealed(attack.good[:length]) if length >= 32 else attack.good[:length])


def test_frames_that_are_too_long(attack):
    for tail in (b"\0", bytes(1000), attack.good):
        attack.expect_refusal(attack.good + tail)


def test_frames_over_the_limit_end_the_connection_unread(attack):
    attack.expect_refusal(bytes(MAX_FRAME_BYTES))  # read, and refused for what it says
    for num_bytes in (MAX_FRAME_BYTES + 100, 2**24):
        with attack.connection() as bad:
            bad.reconnect_ivl = -1
            monitor = bad.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            bad.send(bytes(num_bytes))
            assert monitor.poll(5000)
            bad.disable_monitor()
        attack.honest.check()


def test_frames_in_parts_and_out_of_order(attack):
    head, tail = attack.good[:32], attack.good[32:]
    for parts in ((head, tail), (tail, head), (attack.good, b""), (b"", attack.good), (attack.good, attack.good)):
        attack.expect_refusal(*parts)
    attack.expect_refusal(*[bytes(1000)] * 500)
    attack.expect_refusal(tail + head)
    middle = len(attack.good) // 2
    attack.expect_refusal(attack.good[middle:] + attack.good[:middle])


def test_frames_that_only_a_host_sends(attack):
    attack.expect_refusal(encode(CombineFrame(0, 0, torch.ones(1, 12))))
    attack.expect_refusal(encode(RefusalFrame("failure", "no")))


def test_frames_with_a_flipped_bit(attack):
    generator = random.Random(1)
    for _ in range(NUM_RANDOM):
        frame = bytearray(attack.good)
        position = generator.randrange(8 * len(frame))
        frame[position // 8] ^= 1 << position % 8
        attack.expect_refusal(bytes(frame))


def test_random_bytes(attack):
    generator = random.Random(2)
    for _ in range(NUM_RANDOM):
        attack.expect_refusal(generator.randbytes(generator.choice((1, 7, 32, 33, 300, 5000))))


def test_random_headers_with_a_right_checksum_are_refused_or_answered(attack):
    """What they claim is valid now and then (a probe, or an expert that is not here): then the connection stays."""
    generator = random.Random(3)
    for _ in range(NUM_RANDOM):
        frame = bytearray(attack.good)
        for position in generator.sample(range(5, 28), generator.choice((1, 2, 20))):
            frame[position] = generator.choice((0, 1, 2, 3, 4, 0x13, 0x21, 255))
        with attack.connection() as bad:
            bad.send(resealed(bytes(frame)))
            assert bad.poll(5000)
            answer = decode(bad.recv(), FrameLimits()).frame
            if not isinstance(answer, (ProbeFrame, CombineFrame)):
                assert answer.reason in ("protocol", "stale plan", "request"), answer
        attack.honest.check()


BYTES_OF_OTHERS = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: moe\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "half a greeting": b"\xff" + bytes(8) + b"\x7f\x03",
    "greeting, then noise": b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\0" + bytes(31) + b"\xaa" * 500,
    "greeting of curve, then noise": b"\xff"
    + bytes(8)
    + b"\x7f\x03\x01CURVE"
    + bytes(15)
    + b"\0"
    + bytes(31)
    + b"z" * 500,
    "zmtp 1, a message": b"\x01\x00\x05\x00four",
    "zmtp 1, a huge length": b"\x01\x00\xff" + b"\x7f" * 8 + b"\x00",
    "zmtp 3, a huge length": b"\xff"
    + bytes(8)
    + b"\x7f\x03\x00NULL"
    + bytes(16)
    + b"\0"
    + bytes(31)
    + b"\x06"
    + b"\x7f" * 8,
}


def test_bytes_that_are_not_even_of_zeromq(attack):
    generator = random.Random(4)
    messages = [*BYTES_OF_OTHERS.values(), *[generator.randbytes(200) for _ in range(20)]]
    with ExitStack() as stack:
        for message in messages:
            raw = stack.enter_context(attack.raw_connection())  # stays open, as one that waits for an answer
            raw.sendall(message)
            attack.honest.check()
            closed = attack.raw_connection()
            closed.sendall(message)
            closed.close()
    assert attack.honest.num_answers > len(messages)


def test_a_flood_on_a_dropped_connection_takes_no_memory(attack):
    big = attack.good[:20] + bytes(MAX_FRAME_BYTES - 20)
    with attack.connection() as dropped:
        dropped.sndhwm = 4
        before = psutil.Process().memory_info().rss
        for number in range(2000):
            dropped.send(big)
            if number % 200 == 0:
                attack.honest.check()
        assert psutil.Process().memory_info().rss - before < 40e6 < 2000 * len(big) / 3


@pytest.mark.parametrize("is_remote", [False, True], ids=["unix socket", "tcp and curve"])
def test_answers_that_nobody_fetches_are_kept_to_a_bound(is_remote):
    """A peer that does not even read pings is soon cut off; here it has a minute."""
    frame = greedy_frame()
    with Attack(is_remote, max_frame_bytes=2**20, heartbeat_s=60) as attack, attack.connection() as deaf:
        deaf.rcvhwm = 4
        before = psutil.Process().memory_info().rss
        for number in range(200):
            deaf.send(encode(frame))
            if number % 50 == 0:
                attack.honest.check()
        attack.honest.check()
        assert psutil.Process().memory_info().rss - before < 60e6 < 200 * greedy_answer_bytes(frame) / 3
