"""The traffic meter as Ray metrics, which Ray offers to Prometheus on every node.

moe_bitnet_traffic_bytes_total    by source, destination, layer, direction and kind
moe_bitnet_tokens_total           tokens that went through the model
"""

import threading

from ray.util.metrics import Counter

from cluster.transport.meter import TrafficKey, TrafficMeter

_PERIOD_S = 2.0


class MetricsPublisher:
    """Passes on what a meter counted, every two seconds and at the end.

    Args:
        meter: to read; it may be reset at any time.
    """

    def __init__(self, meter: TrafficMeter) -> None:
        self._meter = meter
        tags = ("source", "destination", "layer", "direction", "kind")
        self._bytes = Counter("moe_bitnet_traffic_bytes", "Bytes of frames between devices.", tag_keys=tags)
        self._tokens = Counter("moe_bitnet_tokens", "Tokens that went through the model.")
        self._told: dict[TrafficKey, int] = {}
        self._told_tokens = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="traffic-metrics", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Pass on what was counted since the last time."""
        totals, num_tokens = self._meter.totals(), self._meter.num_tokens
        if num_tokens < self._told_tokens:  # the meter was reset
            self._told, self._told_tokens = {}, 0
        for key, size in totals.items():
            new = size - self._told.get(key, 0)
            if new > 0:
                self._bytes.inc(new, _tags(key))
        if num_tokens > self._told_tokens:
            self._tokens.inc(num_tokens - self._told_tokens)
        self._told, self._told_tokens = totals, num_tokens

    def close(self) -> None:
        """Pass on the rest and stop."""
        self._is_over.set()
        self._thread.join()
        self.publish()

    def _repeat(self) -> None:
        while not self._is_over.wait(_PERIOD_S):
            self.publish()


def _tags(key: TrafficKey) -> dict[str, str]:
    return {
        "source": key.source,
        "destination": key.destination,
        "layer": str(key.layer_index),
        "direction": key.direction,
        "kind": key.kind,
    }
