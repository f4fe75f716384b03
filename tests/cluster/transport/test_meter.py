import json
import threading

from cluster.transport.meter import TrafficKey, TrafficMeter


def test_bytes_are_kept_by_link_layer_direction_and_kind() -> None:
    meter = TrafficMeter()
    meter.record("home", "b", 0, "dispatch", payload_bytes=100, metadata_bytes=8, header_bytes=32)
    meter.record("home", "b", 0, "dispatch", payload_bytes=50, metadata_bytes=4, header_bytes=32)
    meter.record("b", "home", 0, "combine", payload_bytes=70, metadata_bytes=0, header_bytes=32)
    totals = meter.totals()
    assert totals[TrafficKey("home", "b", 0, "dispatch", "payload")] == 150
    assert totals[TrafficKey("home", "b", 0, "dispatch", "metadata")] == 12
    assert totals[TrafficKey("b", "home", 0, "combine", "header")] == 32
    assert meter.inter_device_bytes() == 328
    assert meter.inter_device_bytes(("payload",)) == 220


def test_bytes_that_stay_on_a_device_do_not_count_as_traffic() -> None:
    meter = TrafficMeter()
    meter.record("home", "home", 1, "dispatch", 100, 8, 32)
    assert sum(meter.totals().values()) == 140
    assert meter.inter_device_bytes() == 0


def test_bytes_per_token_divides_by_the_tokens_counted() -> None:
    meter = TrafficMeter()
    assert meter.bytes_per_token() is None
    meter.record("home", "b", 0, "dispatch", 60, 8, 32)
    meter.add_tokens(3)
    meter.add_tokens(1)
    assert meter.num_tokens == 4
    assert meter.bytes_per_token() == 25
    assert meter.bytes_per_token(("payload", "metadata")) == 17


def test_reset_forgets_everything() -> None:
    meter = TrafficMeter()
    meter.record("home", "b", 0, "dispatch", 60, 8, 32)
    meter.add_tokens(1)
    meter.reset()
    assert meter.totals() == {}
    assert (meter.num_tokens, meter.inter_device_bytes()) == (0, 0)


def test_the_report_is_json_in_sorted_order() -> None:
    meter = TrafficMeter()
    meter.record("home", "c", 1, "dispatch", 1, 2, 3)
    meter.record("home", "b", 0, "dispatch", 4, 5, 6)
    meter.add_tokens(7)
    report = json.loads(json.dumps(meter.to_dict()))
    assert report["inter_device_bytes"] == 21
    assert (report["num_tokens"], report["bytes_per_token"]) == (7, 3)
    assert [(link["destination"], link["kind"], link["bytes"]) for link in report["links"]] == [
        ("b", "header", 6),
        ("b", "metadata", 5),
        ("b", "payload", 4),
        ("c", "header", 3),
        ("c", "metadata", 2),
        ("c", "payload", 1),
    ]


def test_threads_lose_no_byte() -> None:
    meter = TrafficMeter()

    def work() -> None:
        for _ in range(1000):
            meter.record("home", "b", 0, "dispatch", 3, 2, 1)
            meter.add_tokens(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.inter_device_bytes() == 24_000
    assert meter.num_tokens == 4000
