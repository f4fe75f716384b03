"""Counting the bytes that frames move between devices.

Whoever sends a frame records it here; the counters answer how many bytes crossed
each link and what a token cost. What is counted are the bytes of frames: payload
(rows and scales), metadata (expert ids and row indices) and frame headers. TCP/IP
headers are not seen from here (52 to 66 bytes a segment).
"""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Direction = Literal["dispatch", "combine"]
ByteKind = Literal["payload", "metadata", "header"]

_ALL_KINDS: tuple[ByteKind, ...] = ("payload", "metadata", "header")


class TrafficKey(NamedTuple):
    """What one counter counts."""

    source: str
    destination: str
    layer_index: int
    direction: Direction
    kind: ByteKind


class TrafficMeter:
    """Byte counters by link, layer, direction and kind; any thread may record.

    Devices are named as in the placement, since an index changes its meaning with the next plan.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[TrafficKey] = Counter()
        self._num_tokens = 0

    def record(
        self,
        source: str,
        destination: str,
        layer_index: int,
        direction: Direction,
        payload_bytes: int,
        metadata_bytes: int,
        header_bytes: int,
    ) -> None:
        """Count one frame from ``source`` to ``destination`` (device names); sizes in bytes."""
        sizes = (payload_bytes, metadata_bytes, header_bytes)
        assert min(sizes) >= 0, sizes
        with self._lock:
            for kind, size in zip(_ALL_KINDS, sizes, strict=True):
                self._bytes[TrafficKey(source, destination, layer_index, direction, kind)] += size

    def add_tokens(self, num_tokens: int) -> None:
        """Count tokens that went through the model, once each and not once a layer."""
        assert num_tokens >= 0, num_tokens
        with self._lock:
            self._num_tokens += num_tokens

    def reset(self) -> None:
        """Set every counter to zero."""
        with self._lock:
            self._bytes.clear()
            self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens counted since the last reset."""
        with self._lock:
            return self._num_tokens

    def totals(self) -> dict[TrafficKey, int]:
        """Return a copy of all counters, in bytes."""
        with self._lock:
            return dict(self._bytes)

    def inter_device_bytes(self, kinds: Sequence[ByteKind] = _ALL_KINDS) -> int:
        """Return the bytes whose source and destination differ.

        Args:
            kinds: which bytes to count; ``("payload", "metadata")`` is what the cost model predicts.
        """
        return _inter_device(self.totals(), kinds)

    def bytes_per_token(self, kinds: Sequence[ByteKind] = _ALL_KINDS) -> float | None:
        """Return inter-device bytes per counted token, or ``None`` while no token was counted."""
        with self._lock:
            counters, num_tokens = dict(self._bytes), self._num_tokens
        return _inter_device(counters, kinds) / num_tokens if num_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything counted as a JSON-ready dictionary, links in sorted order."""
        with self._lock:
            counters, num_tokens = dict(self._bytes), self._num_tokens
        inter_device_bytes = _inter_device(counters, _ALL_KINDS)
        return {
            "num_tokens": num_tokens,
            "inter_device_bytes": inter_device_bytes,
            "bytes_per_token": inter_device_bytes / num_tokens if num_tokens else None,
            "links": [{**key._asdict(), "bytes": counters[key]} for key in sorted(counters)],
        }


def _inter_device(counters: dict[TrafficKey, int], kinds: Sequence[ByteKind]) -> int:
    return sum(size for key, size in counters.items() if key.source != key.destination and key.kind in kinds)
