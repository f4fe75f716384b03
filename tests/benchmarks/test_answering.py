from dataclasses import replace

import pytest

from benchmarks.answering import (
    LIMITS,
    PreparedAnswers,
    TcpEcho,
    _child,
    answer_frame,
    dispatch_frame,
    frame_server,
    tcp_server,
)
from cluster.machine import machine_id
from cluster.transport.codec import decode, encode
from cluster.transport.links import HostLinks, LinkTimes
from cluster.transport.sockets import KeyPair


def key_pair_that_begins_with_a_dash() -> KeyPair:
    """One of 85 pairs does."""
    return next(keys for keys in iter(KeyPair.generate, None) if keys.public.startswith("-"))


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_prepared_answer_has_the_size_of_the_one_that_tcp_carries(num_tokens):
    frame = dispatch_frame(num_tokens, 33, 3)
    answer = PreparedAnswers().answer(memoryview(encode(frame, 5)))
    assert len(answer) == len(encode(answer_frame(frame)))
    assert decode(answer, LIMITS).request_id == 5


def test_processes_answer_by_unix_socket_and_encrypted_and_end_with_the_block():
    keys, frame = key_pair_that_begins_with_a_dash(), dispatch_frame(7, 33, 3)
    with frame_server(keys.public) as address:
        for name in (machine_id(), "another machine"):
            links = HostLinks(name, keys, LIMITS, LinkTimes())
            links.set_addresses([replace(address, device_name="host")])
            [answer] = links.wait({"host": links.send("host", frame)})
            assert answer.frame is not None
            assert answer.frame.rows.shape == (7, 33)
            assert links.is_encrypted("host") == (name != machine_id())
            links.close()


def test_a_process_that_does_not_start_is_named():
    with pytest.raises(RuntimeError, match="answering -- nonsense ended with status 2"), _child("nonsense"):
        pass


def test_the_plain_server_answers_as_many_bytes_as_it_is_asked_for():
    with tcp_server() as port:
        for answer_bytes in (1, 100_000):
            echo = TcpEcho(port, bytes(70_000), answer_bytes)
            echo.send()
            echo.receive()
            echo.close()
