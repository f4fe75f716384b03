import pytest

from benchmarks.answering import dispatch_frame
from benchmarks.dispatch_latency import ACTORS, CURVE, IPC, TCP, UNREAD, candidates, start_peers

pytestmark = pytest.mark.ray


def test_every_candidate_exchanges_frames_of_every_size():
    with start_peers() as peers:
        for num_tokens in (1, 7):
            with candidates(peers, dispatch_frame(num_tokens, 33, 3)) as functions:
                assert set(functions) == {TCP, UNREAD, IPC, CURVE, ACTORS}
                for exchange in functions.values():
                    exchange()
        assert all(peers.links[CURVE].is_encrypted(address.device_name) for address in peers.addresses)
        assert not any(peers.links[IPC].is_encrypted(address.device_name) for address in peers.addresses)
