import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from cluster.transport.bulk import DISPATCHER, HOST, BulkChannel, Rendezvous
from moe_bitnet.errors import HostDownError


def pair(timeout_s=5.0):
    """Both ends in this process."""
    ends = {}
    ends[DISPATCHER] = Rendezvous(lambda key, value: ends[HOST].put(key, value), timeout_s)
    ends[HOST] = Rendezvous(lambda key, value: ends[DISPATCHER].put(key, value), timeout_s)
    channels = {}

    def open_end(rank):
        channels[rank] = BulkChannel(ends[rank], rank, "127.0.0.1", timeout_s)

    threads = [threading.Thread(target=open_end, args=(rank,)) for rank in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return channels[DISPATCHER], channels[HOST]


@pytest.mark.parametrize("num_bytes", [1, 7, 4096, 3_000_001])
def test_frames_come_out_as_they_went_in_both_ways(num_bytes):
    dispatcher, host = pair()
    frame = os.urandom(num_bytes)
    for source, target in ((dispatcher, host), (host, dispatcher)):
        sender = threading.Thread(target=source.send, args=(frame,))
        sender.start()
        assert target.receive(num_bytes) == frame
        sender.join()


def test_the_order_is_kept():
    dispatcher, host = pair()
    frames = [bytes([value]) * 10 for value in range(5)]
    sender = threading.Thread(target=lambda: [dispatcher.send(frame) for frame in frames])
    sender.start()
    assert [bytes(host.receive(10)) for _ in frames] == frames
    sender.join()


def test_it_listens_at_its_address_alone():
    before = {each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN}
    ends = pair()
    listening = [each for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    assert {each.laddr.ip for each in listening if each.laddr not in before} <= {"127.0.0.1"}
    assert ends


def test_an_end_that_does_not_come_is_an_error():
    with pytest.raises(HostDownError, match=r"could not be opened|did not give its address within 0\.2 s"):
        BulkChannel(Rendezvous(lambda key, value: None, 0.2), DISPATCHER, "127.0.0.1", 0.2)


def test_an_end_that_sends_nothing_is_an_error_in_time():
    dispatcher, _host = pair(timeout_s=0.3)
    with pytest.raises(HostDownError, match="bulk channel broke"):
        dispatcher.receive(10)


KILLED_HOST = """
import sys, threading
from cluster.transport.bulk import HOST, BulkChannel, Rendezvous
def publish(key, value):
    print(key, value.hex(), flush=True)
rendezvous = Rendezvous(publish, 20)
def read():
    for line in sys.stdin:
        key, value = line.split()
        rendezvous.put(key, bytes.fromhex(value))
threading.Thread(target=read, daemon=True).start()
channel = BulkChannel(rendezvous, HOST, "127.0.0.1", 20)
channel.receive(10)
"""


def test_an_end_that_is_killed_is_an_error_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_HOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )

    def publish(key, value):
        process.stdin.write(f"{key} {value.hex()}\n")
        process.stdin.flush()

    rendezvous = Rendezvous(publish, 60)
    threading.Thread(target=lambda: rendezvous.put(*read_value(process)), daemon=True).start()
    channel = BulkChannel(rendezvous, DISPATCHER, "127.0.0.1", 60)
    threading.Timer(0.2, process.send_signal, [signal.SIGKILL]).start()
    with pytest.raises(HostDownError, match="bulk channel broke"):
        channel.receive(10)
    process.communicate()


def read_value(process):
    key, value = process.stdout.readline().split()
    return key, bytes.fromhex(value)
