import logging
from contextlib import contextmanager

import pytest
import torch
from transport_factories import ELSEWHERE, LOOPBACK, dispatch_frame, double, doubled, serving

from cluster.transport.bulk import DISPATCHER, BulkChannel, Rendezvous
from cluster.transport.bulk_host import BulkHost
from cluster.transport.codec import decode, encode
from cluster.transport.frames import BulkFrame
from cluster.transport.header import FrameLimits
from cluster.transport.links import BulkPath, HostLinks, LinkTimes
from cluster.transport.sockets import KeyPair
from moe_bitnet.errors import BulkChannelError, FrameError

MIN_BYTES = 2000
SMALL, LARGE = dispatch_frame(num_rows=3), dispatch_frame(num_rows=300)


@contextmanager
def linked(timeout_s=5.0):
    """Links to one host by TCP with a bulk channel; also the host's end, and the sizes of frames on the socket."""
    keys, sizes = KeyPair.generate(), []
    bulk = BulkHost(double, FrameLimits())

    def answer(frame):
        sizes.append(len(frame))
        return bulk.answer(frame)

    with serving(answer, [keys]) as server:
        links = HostLinks(ELSEWHERE, keys, FrameLimits(), LinkTimes(request_timeout_s=timeout_s))
        links.set_addresses([server.address])
        try:
            channel_id, published = bulk.open(LOOPBACK, timeout_s)
            rendezvous = Rendezvous(lambda key, value: bulk.put(channel_id, key, value), timeout_s)
            for key, value in published:
                rendezvous.put(key, value)
            channel = BulkChannel(rendezvous, DISPATCHER, LOOPBACK, timeout_s)
            links.use_bulk("host", BulkPath(channel, channel_id, MIN_BYTES))
            yield links, bulk, sizes
        finally:
            links.close()


def ask(links, frame):
    return next(iter(links.wait({"host": links.send("host", frame)})))


def test_large_frames_take_the_channel_and_small_ones_the_socket():
    with linked() as (links, _, sizes):
        for frame in (SMALL, LARGE, SMALL, LARGE, LARGE):
            assert torch.equal(ask(links, frame).frame.values(), doubled(frame))
        assert sizes == [len(encode(SMALL)), 32, len(encode(SMALL)), 32, 32]
        assert links.has_bulk("host")


def test_a_channel_that_breaks_at_the_host_is_left_for_the_socket(caplog):
    caplog.set_level(logging.WARNING)
    with linked() as (links, bulk, sizes):
        bulk._channels.clear()
        assert "no bulk channel" in str(ask(links, LARGE).error)
        assert links.is_up("host")
        assert torch.equal(ask(links, LARGE).frame.values(), doubled(LARGE))
        assert sizes[-1] == len(encode(LARGE))
        assert "gets large frames by its socket again" in caplog.text


def test_a_host_that_announces_and_does_not_send_is_left_for_the_socket():
    with linked(timeout_s=0.5) as (links, bulk, _):
        for channel in bulk._channels.values():
            channel.result().send = lambda frame: None
        assert "bulk channel broke" in str(ask(links, LARGE).error)
        assert not links.has_bulk("host")
        assert torch.equal(ask(links, LARGE).frame.values(), doubled(LARGE))


def test_a_frame_for_a_channel_that_is_not_open_is_refused():
    with pytest.raises(BulkChannelError, match="no bulk channel 7 is open"):
        BulkHost(double, FrameLimits()).answer(memoryview(encode(BulkFrame(100, 7))))


def test_what_is_announced_is_limited_before_memory_is_taken():
    limits = FrameLimits(max_frame_bytes=1000)
    assert decode(encode(BulkFrame(1000, 1), 5), limits).frame == BulkFrame(1000, 1)
    with pytest.raises(FrameError, match="pairs: 1001 given, the limit is 1000"):
        decode(encode(BulkFrame(1001, 1)), limits)
