import dataclasses
import pickle

import pytest
import zmq
from transport_factories import LOOPBACK, Relay

from cluster.transport.sockets import HostAddress, KeyPair, framing_bytes, set_common_options

ADDRESS = HostAddress("device-1", "here", "ipc:///tmp/x", "tcp://10.0.0.1:5000", "public")


def test_a_secret_is_never_shown():
    keys = KeyPair.generate()
    assert (len(keys.public), len(keys.secret)) == (40, 40)
    for text in (repr(keys), str(keys), f"{keys}", repr([keys])):
        assert keys.secret not in text
        assert keys.public in text
    assert KeyPair.generate() != keys


def test_the_local_endpoint_is_for_the_same_machine_alone():
    assert ADDRESS.endpoint_from("here") == "ipc:///tmp/x"
    assert ADDRESS.endpoint_from("elsewhere") == "tcp://10.0.0.1:5000"
    alone = dataclasses.replace(ADDRESS, remote_endpoint=None)
    assert alone.endpoint_from("elsewhere") == "ipc:///tmp/x"
    assert pickle.loads(pickle.dumps(ADDRESS)) == ADDRESS


@pytest.mark.parametrize("heartbeat_s", [0.01, 0.6, 3600.0, 10**6])
def test_silence_of_heartbeat_s_is_noticed_whatever_its_length(heartbeat_s):
    """ZeroMQ asks after the interval, then waits for the time-out: both together are the silence."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        set_common_options(socket, heartbeat_s, 1000)
        assert socket.heartbeat_ivl + socket.heartbeat_timeout <= heartbeat_s * 1000
        assert socket.heartbeat_ivl * 2 <= socket.heartbeat_timeout  # one lost answer is not yet silence
        assert socket.linger == 0
        assert 1000 <= socket.maxmsgsize < 1100


def test_no_end_queues_many_frames():
    """A frame may have a gigabyte; a dispatcher has one request on the way to a host."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        set_common_options(socket, 0.6, 1000)
        assert 1 < socket.sndhwm == socket.rcvhwm <= 16


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_framing_is_what_zeromq_sends(is_encrypted):
    """A relay between two plain sockets counts, after the handshake, what a message of each size takes."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        if is_encrypted:
            host, home = KeyPair.generate(), KeyPair.generate()
            router.curve_server = True
            router.curve_secretkey = host.secret.encode()
            dealer.curve_serverkey = host.public.encode()
            dealer.curve_publickey, dealer.curve_secretkey = home.public.encode(), home.secret.encode()
        router.linger = dealer.linger = 0
        port = router.bind_to_random_port(f"tcp://{LOOPBACK}")
        with Relay(port) as relay:
            dealer.connect(f"tcp://{LOOPBACK}:{relay.port}")
            peer = exchange(dealer, router, b"hello")
            for frame_bytes in (1, 32, 200, 221, 222, 223, 224, 254, 255, 256, 257, 8000, 70_000, 300_000):
                before, expected = relay.to_target, frame_bytes + framing_bytes(frame_bytes, is_encrypted)
                assert exchange(dealer, router, bytes(frame_bytes)) == peer
                assert relay.to_target == before + expected, frame_bytes

                before = relay.from_target
                router.send_multipart([peer, bytes(frame_bytes)])
                assert len(dealer.recv()) == frame_bytes
                assert relay.from_target == before + expected, frame_bytes


def exchange(dealer, router, message):
    dealer.send(message)
    assert router.poll(5000)
    peer, received = router.recv_multipart()
    assert received == message
    return peer
