from collections import defaultdict

import pytest

from cluster import ray_metrics
from cluster.ray_metrics import MetricsPublisher
from cluster.transport.meter import TrafficMeter


class Counter:
    """Adds up what Ray's counter is told."""

    def __init__(self, name, description, tag_keys=()):
        self.name, self.tag_keys, self.values = name, tag_keys, defaultdict(float)

    def inc(self, value, tags=None):
        assert value > 0, "Ray refuses anything else"
        assert set(tags or {}) == set(self.tag_keys)
        self.values[tuple(sorted((tags or {}).items()))] += value


@pytest.fixture
def publisher(monkeypatch):
    monkeypatch.setattr(ray_metrics, "Counter", Counter)
    meter = TrafficMeter()
    publisher = MetricsPublisher(meter)
    yield publisher, meter
    publisher.close()


def record(meter, size):
    meter.record("a", "b", 2, "dispatch", {"payload": size, "metadata": 0, "header": 32, "framing": 9})


KEY = (("destination", "b"), ("direction", "dispatch"), ("kind", "payload"), ("layer", "2"), ("source", "a"))


def test_counters_follow_the_meter_and_count_nothing_twice(publisher):
    publisher, meter = publisher
    for size, total in ((100, 100), (20, 120)):
        record(meter, size)
        meter.add_tokens(3)
        publisher.publish()
        publisher.publish()
        assert publisher._bytes.values[KEY] == total
    assert publisher._tokens.values[()] == 6
    assert sum(publisher._bytes.values.values()) == meter.inter_device_bytes()


def test_a_meter_that_was_reset_goes_on_counting(publisher):
    publisher, meter = publisher
    record(meter, 100)
    meter.add_tokens(5)
    publisher.publish()
    meter.reset()
    record(meter, 7)
    meter.add_tokens(1)
    publisher.publish()
    assert publisher._bytes.values[KEY] == 107
    assert publisher._tokens.values[()] == 6


def test_closing_tells_the_rest(monkeypatch):
    monkeypatch.setattr(ray_metrics, "Counter", Counter)
    meter = TrafficMeter()
    publisher = MetricsPublisher(meter)
    record(meter, 4)
    publisher.close()
    assert publisher._bytes.values[KEY] == 4
    assert not publisher._thread.is_alive()
