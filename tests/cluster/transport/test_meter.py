import json
import threading

import pytest
import torch
from transport_factories import DTYPES, dispatch_frame, rows_of

from cluster.transport.codec import encode
from cluster.transport.frames import CombineFrame
from cluster.transport.meter import TrafficKey, TrafficMeter, frame_sizes
from cluster.transport.row_format import Combine
from cluster.transport.sockets import framing_bytes


def sizes(payload=0, metadata=0, header=0, framing=0):
    return {"payload": payload, "metadata": metadata, "header": header, "framing": framing}


def test_bytes_are_kept_by_link_layer_direction_and_kind():
    meter = TrafficMeter()
    meter.record("home", "b", 0, "dispatch", sizes(100, 8, 32, 2))
    meter.record("home", "b", 0, "dispatch", sizes(50, 4, 34, 9))
    meter.record("b", "home", 1, "combine", sizes(70, 0, 32, 42))
    totals = meter.totals()
    assert totals[TrafficKey("home", "b", 0, "dispatch", "payload")] == 150
    assert totals[TrafficKey("home", "b", 0, "dispatch", "metadata")] == 12
    assert totals[TrafficKey("home", "b", 0, "dispatch", "header")] == 66
    assert totals[TrafficKey("home", "b", 0, "dispatch", "framing")] == 11
    assert totals[TrafficKey("b", "home", 1, "combine", "framing")] == 42
    assert meter.inter_device_bytes() == 383
    assert meter.inter_device_bytes(("payload",)) == 220
    assert meter.inter_device_bytes(("payload", "metadata")) == 232


def test_bytes_that_stay_on_a_device_do_not_count_as_traffic():
    meter = TrafficMeter()
    meter.record("home", "home", 1, "dispatch", sizes(100, 8, 32))
    assert sum(meter.totals().values()) == 140
    assert meter.inter_device_bytes() == meter.wire_bytes() == 0


def test_bytes_per_token_divides_by_the_tokens_counted():
    meter = TrafficMeter()
    assert meter.bytes_per_token() is None
    meter.record("home", "b", 0, "dispatch", sizes(60, 8, 32, 8))
    meter.add_tokens(3)
    meter.add_tokens(1)
    assert meter.num_tokens == 4
    assert meter.bytes_per_token() == 27
    assert meter.bytes_per_token(("payload", "metadata")) == 17


def test_reset_forgets_everything():
    meter = TrafficMeter()
    meter.record("home", "b", 0, "dispatch", sizes(60, 8, 32, 2))
    meter.add_tokens(1)
    meter.reset()
    assert meter.totals() == {}
    assert (meter.num_tokens, meter.inter_device_bytes(), meter.wire_bytes()) == (0, 0, 0)


def test_the_report_is_json_in_sorted_order():
    meter = TrafficMeter()
    meter.record("home", "c", 1, "dispatch", {"payload": 1, "metadata": 2})
    meter.record("home", "b", 0, "dispatch", {"header": 4, "framing": 7})
    meter.add_tokens(7)
    report = json.loads(json.dumps(meter.to_dict()))
    assert report["inter_device_bytes"] == 14
    assert (report["num_tokens"], report["bytes_per_token"]) == (7, 2)
    assert report["wire_bytes"] == meter.wire_bytes()
    assert [(link["destination"], link["kind"], link["bytes"]) for link in report["links"]] == [
        ("b", "framing", 7),
        ("b", "header", 4),
        ("c", "metadata", 2),
        ("c", "payload", 1),
    ]


def test_threads_lose_no_byte():
    meter = TrafficMeter()

    def work():
        for _ in range(1000):
            meter.record("home", "b", 0, "dispatch", sizes(3, 2, 1))
            meter.add_tokens(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.inter_device_bytes() == 24_000
    assert meter.num_tokens == 4000


def test_a_report_taken_while_others_record_agrees_with_itself():
    meter, is_over = TrafficMeter(), threading.Event()

    def work():
        while not is_over.is_set():
            meter.record("home", "b", 0, "dispatch", sizes(1000))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(300):
            report = meter.to_dict()
            num_frames = report["inter_device_bytes"] // 1000
            assert sum(link["bytes"] for link in report["links"]) == report["inter_device_bytes"]
            assert report["wire_bytes"] == report["inter_device_bytes"] + 66 * max(
                num_frames, report["inter_device_bytes"] // 1448 + num_frames // 2
            )
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("frame_bytes", [41, 1448, 100_000, 10**7])
def test_wire_bytes_add_a_header_for_each_segment(frame_bytes):
    """A frame of n bytes takes ceil(n / 1448) segments; the estimate is off by half a segment a frame at most."""
    meter, num_frames = TrafficMeter(), 100
    for _ in range(num_frames):
        meter.record("home", "b", 0, "dispatch", sizes(frame_bytes))
    exact = num_frames * (frame_bytes + 66 * -(-frame_bytes // 1448))
    assert abs(meter.wire_bytes() - exact) <= num_frames * 66 / 2 + 66
    assert meter.wire_bytes(segment_bytes=10**9) == num_frames * (frame_bytes + 66)


@pytest.mark.parametrize("is_encrypted", [False, True])
@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
@pytest.mark.parametrize("row_format", DTYPES)
def test_the_kinds_of_a_frame_add_up_to_what_is_sent(row_format, mode, is_encrypted):
    for num_rows, pairs in ((0, (1,)), (1, (1,)), (7, (1, 2)), (7, (3,)), (33, (255, 1))):
        frame = dispatch_frame(num_rows, 33, row_format, Combine(mode, "float32"), pairs)
        num_pairs, parts = len(frame.expert_ids), frame_sizes(frame, is_encrypted)
        encoded = encode(frame)
        assert parts["payload"] == frame.rows.nbytes + (0 if frame.scales is None else frame.scales.nbytes)
        assert parts["metadata"] == num_rows + num_pairs * (6 if mode == "partial_sums" else 2)
        assert parts["header"] == 32 + 2 * (num_pairs % 2)
        assert parts["framing"] == framing_bytes(len(encoded), is_encrypted)
        assert sum(parts.values()) == len(encoded) + framing_bytes(len(encoded), is_encrypted)

        answer = CombineFrame(0, 0, *rows_of(row_format, num_rows, 33))
        parts = frame_sizes(answer, is_encrypted)
        assert (parts["metadata"], parts["header"]) == (0, 32)
        assert parts["payload"] + 32 == len(encode(answer))
        assert parts["framing"] == framing_bytes(len(encode(answer)), is_encrypted)


def test_strided_and_wide_rows_weigh_what_they_weigh_on_the_wire():
    rows = torch.ones(33, 14).T[::2]
    assert frame_sizes(CombineFrame(0, 0, rows), is_encrypted=False)["payload"] == 7 * 33 * 4
