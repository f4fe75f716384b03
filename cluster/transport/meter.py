"""Counting the bytes that frames move between devices.

Whoever sends or receives a frame records it here; the counters answer how many bytes crossed each link and what a token
cost. Four kinds are kept apart:

    payload    rows and scales
    metadata   expert ids, experts a row, expert weights
    header     the header of a frame, and two bytes of padding where needed
    framing    what ZeroMQ and its encryption add

TCP/IP headers are not seen from here: 52 to 66 bytes a segment, of which :meth:`TrafficMeter.wire_bytes` makes an
estimate.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cluster.transport.frames import (
    HEADER_BYTES,
    CombineFrame,
    DispatchFrame,
    metadata_bytes,
    padding_bytes,
    payload_bytes,
)
from cluster.transport.sockets import framing_bytes

Direction = Literal["dispatch", "combine", "combine_gradient", "dispatch_gradient"]
"""Rows to experts, their outputs home, and in training the gradients of both, the other way."""
ByteKind = Literal["payload", "metadata", "header", "framing"]

_ALL_KINDS: tuple[ByteKind, ...] = ("payload", "metadata", "header", "framing")
_SEGMENT_BYTES = 1448  # an Ethernet packet of 1500 without the headers of IPv4 and TCP
_SEGMENT_HEADER_BYTES = 66  # Ethernet 14, IPv4 20, TCP with timestamps 32


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
        self._num_tokens = self._num_frames = 0

    def record(
        self,
        source: str,
        destination: str,
        layer_index: int,
        direction: Direction,
        sizes: Mapping[ByteKind, int],
    ) -> None:
        """Count one frame from ``source`` to ``destination`` (device names); sizes in bytes."""
        assert min(sizes.values()) >= 0, sizes
        with self._lock:
            for kind, size in sizes.items():
                self._bytes[TrafficKey(source, destination, layer_index, direction, kind)] += size
            self._num_frames += source != destination

    def add_tokens(self, num_tokens: int) -> None:
        """Count tokens that went through the model, once each and not once a layer."""
        assert num_tokens >= 0, num_tokens
        with self._lock:
            self._num_tokens += num_tokens

    def reset(self) -> None:
        """Set every counter to zero."""
        with self._lock:
            self._bytes.clear()
            self._num_tokens = self._num_frames = 0

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

    def wire_bytes(self, segment_bytes: int = _SEGMENT_BYTES) -> int:
        """Estimate the bytes on an Ethernet between devices: all that is counted, and TCP/IP headers.

        Args:
            segment_bytes: payload of a TCP segment. Cards and virtual links that join segments show fewer headers;
                acknowledgements (66 bytes for every second segment, the other way) are not counted.
        """
        with self._lock:
            crossed, num_frames = _inter_device(self._bytes, _ALL_KINDS), self._num_frames
        return _wire_bytes(crossed, num_frames, segment_bytes)

    def bytes_per_token(self, kinds: Sequence[ByteKind] = _ALL_KINDS) -> float | None:
        """Return inter-device bytes per counted token, or ``None`` while no token was counted."""
        with self._lock:
            counters, num_tokens = dict(self._bytes), self._num_tokens
        return _inter_device(counters, kinds) / num_tokens if num_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything counted as a JSON-ready dictionary, links in sorted order."""
        with self._lock:
            counters, num_tokens, num_frames = dict(self._bytes), self._num_tokens, self._num_frames
        inter_device_bytes = _inter_device(counters, _ALL_KINDS)
        return {
            "num_tokens": num_tokens,
            "inter_device_bytes": inter_device_bytes,
            "bytes_per_token": inter_device_bytes / num_tokens if num_tokens else None,
            "wire_bytes": _wire_bytes(inter_device_bytes, num_frames, _SEGMENT_BYTES),
            "links": [{**key._asdict(), "bytes": counters[key]} for key in sorted(counters)],
        }


def frame_sizes(frame: DispatchFrame | CombineFrame, is_encrypted: bool) -> dict[ByteKind, int]:
    """Return the bytes of each kind that a frame brings to the wire."""
    payload, metadata = payload_bytes(frame), metadata_bytes(frame)
    frame_bytes = HEADER_BYTES + payload + metadata + padding_bytes(frame)
    return {
        "payload": payload,
        "metadata": metadata,
        "header": frame_bytes - payload - metadata,
        "framing": framing_bytes(frame_bytes, is_encrypted),
    }


def _wire_bytes(crossed_bytes: int, num_frames: int, segment_bytes: int) -> int:
    # every frame ends a segment: half a segment is empty on average, so at least one header a frame
    num_segments = max(num_frames, crossed_bytes // segment_bytes + num_frames // 2)
    return crossed_bytes + num_segments * _SEGMENT_HEADER_BYTES


def _inter_device(counters: Mapping[TrafficKey, int], kinds: Sequence[ByteKind]) -> int:
    return sum(size for key, size in counters.items() if key.source != key.destination and key.kind in kinds)
