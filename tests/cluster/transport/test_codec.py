import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.transport.codec import decode_combine, decode_dispatch, encode
from cluster.transport.frames import HEADER_BYTES, CombineFrame, DispatchFrame, metadata_bytes, payload_bytes
from cluster.transport.header import FrameLimits
from moe_bitnet.errors import ClusterError, ConfigError, ShapeError

LIMITS = FrameLimits()
DTYPES = (torch.int8, torch.float16, torch.float32)


def dispatch_frame(num_rows: int, hidden_size: int, num_pairs: int, dtype: torch.dtype, seed: int = 0) -> DispatchFrame:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (num_rows, hidden_size), generator=generator)
    return DispatchFrame(
        layer_index=3,
        epoch=41,
        rows=values.to(dtype),
        expert_ids=torch.randint(0, 9, (num_pairs,), generator=generator).sort().values.int(),
        row_indices=torch.randint(0, max(1, num_rows), (num_pairs,), generator=generator).int(),
        scales=torch.rand(num_rows, 1, generator=generator) if dtype == torch.int8 else None,
    )


def sealed(header_fields: bytes, body: bytes) -> bytes:
    """A frame with a right checksum around whatever it says."""
    return header_fields + struct.pack("<I", zlib.crc32(body, zlib.crc32(header_fields))) + body


def assert_same(left: torch.Tensor | None, right: torch.Tensor | None) -> None:
    assert (left is None) == (right is None)
    if left is not None and right is not None:
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 1, 0), (1, 1, 1), (7, 33, 0), (7, 33, 20), (33, 7, 5)])
def test_decode_inverts_encode_for_dispatch(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    frame = dispatch_frame(*sizes, dtype)
    encoded = encode(frame)
    assert len(encoded) == HEADER_BYTES + payload_bytes(frame) + metadata_bytes(frame)
    decoded = decode_dispatch(encoded, LIMITS)
    assert (decoded.layer_index, decoded.epoch) == (3, 41)
    for name in ("rows", "scales", "expert_ids", "row_indices"):
        assert_same(getattr(decoded, name), getattr(frame, name))
    assert encode(decoded) == encoded


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33)])
def test_decode_inverts_encode_for_combine(shape: tuple[int, int], dtype: torch.dtype) -> None:
    frame = CombineFrame(
        layer_index=0, epoch=2**32 - 1, rows=torch.arange(-3.5, shape[0] * shape[1] - 3.5).reshape(shape).to(dtype)
    )
    encoded = encode(frame)
    assert len(encoded) == HEADER_BYTES + payload_bytes(frame)
    assert metadata_bytes(frame) == 0
    decoded = decode_combine(encoded, LIMITS)
    assert (decoded.layer_index, decoded.epoch) == (0, 2**32 - 1)
    assert_same(decoded.rows, frame.rows)


def test_values_that_are_not_finite_pass_bit_for_bit() -> None:
    rows = torch.tensor([[float("nan"), float("inf"), -0.0]])
    decoded = decode_combine(encode(CombineFrame(0, 0, rows)), LIMITS)
    assert torch.equal(decoded.rows.view(torch.int32), rows.view(torch.int32))


def test_strided_rows_with_gradients_are_encoded_as_their_values() -> None:
    rows = torch.arange(24.0, requires_grad=True).reshape(6, 4).T[::2]
    decoded = decode_combine(encode(CombineFrame(0, 0, rows)), LIMITS)
    assert torch.equal(decoded.rows, rows.detach())


def test_a_writable_buffer_is_viewed_and_a_read_only_one_copied_without_warnings() -> None:
    frame = dispatch_frame(7, 33, 20, torch.int8)
    encoded = encode(frame)
    shifted = memoryview(bytearray(b"x" + encoded))[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for buffer in (encoded, bytearray(encoded), memoryview(encoded), shifted):
            decoded = decode_dispatch(buffer, LIMITS)
            assert_same(decoded.scales, frame.scales)
            decoded.rows.zero_()
    assert encode(frame) == encoded
    viewed = bytearray(encoded)
    decode_dispatch(viewed, LIMITS).rows.zero_()
    assert viewed != encoded


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_truncation_is_refused(dtype: torch.dtype) -> None:
    encoded = encode(dispatch_frame(3, 7, 5, dtype))
    for length in range(len(encoded)):
        with pytest.raises(ClusterError, match="frame refused"):
            decode_dispatch(encoded[:length], LIMITS)
    with pytest.raises(ClusterError, match="header announces"):
        decode_dispatch(encoded + b"\0", LIMITS)


def test_every_changed_byte_is_caught() -> None:
    encoded_dispatch = encode(dispatch_frame(3, 7, 5, torch.int8))
    encoded_combine = encode(CombineFrame(1, 2, torch.arange(21.0).reshape(3, 7)))
    for encoded, decode in ((encoded_dispatch, decode_dispatch), (encoded_combine, decode_combine)):
        for position in range(len(encoded)):
            for flip in (0x01, 0x80, 0xFF):
                altered = bytearray(encoded)
                altered[position] ^= flip
                with pytest.raises(ClusterError, match="frame refused"):
                    decode(altered, LIMITS)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(buffer: bytes) -> None:
    for decode in (decode_dispatch, decode_combine):
        with pytest.raises(ClusterError, match="frame refused"):
            decode(buffer, LIMITS)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.integers(0, 3),
    st.integers(0, 4),
    st.tuples(*[st.one_of(st.integers(0, 6), st.integers(0, 2**32 - 1)) for _ in range(3)]),
    st.binary(max_size=120),
)
def test_any_claim_with_a_right_checksum_is_a_frame_or_a_cluster_error(
    kind: int, row_format: int, counts: tuple[int, int, int], body: bytes
) -> None:
    buffer = sealed(struct.pack("<4sBBBxIIIII", b"MoEf", 1, kind, row_format, 0, 0, *counts), body)
    decoders: list[Callable[[bytes, FrameLimits], DispatchFrame | CombineFrame]] = [decode_dispatch, decode_combine]
    for decode in decoders:
        try:
            frame = decode(buffer, LIMITS)
        except ClusterError:
            continue
        assert encode(frame) == buffer


def test_huge_claims_are_refused_before_memory_is_taken() -> None:
    buffer = sealed(struct.pack("<4sBBBxIIIII", b"MoEf", 1, 1, 3, 0, 0, *[2**32 - 1] * 3), b"")
    no_limits = FrameLimits(*[2**70] * 4)
    tracemalloc.start()
    for limits in (LIMITS, no_limits):
        with pytest.raises(ClusterError, match="frame refused"):
            decode_dispatch(buffer, limits)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (FrameLimits(max_frame_bytes=100), "frame bytes: 371 given, the limit is 100"),
        (FrameLimits(max_num_rows=6), "rows: 7 given, the limit is 6"),
        (FrameLimits(max_hidden_size=32), "hidden size: 33 given, the limit is 32"),
        (FrameLimits(max_num_pairs=9), "pairs: 10 given, the limit is 9"),
    ],
)
def test_a_frame_over_a_limit_is_refused_with_the_limit(limits: FrameLimits, message: str) -> None:
    encoded = encode(dispatch_frame(7, 33, 10, torch.int8))
    with pytest.raises(ClusterError, match=message):
        decode_dispatch(encoded, limits)
    decode_dispatch(encoded, FrameLimits(max_frame_bytes=371, max_num_rows=7, max_hidden_size=33, max_num_pairs=10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((b"HTTP", 1, 1, 3, 0, 0, 1, 1, 0), "magic"),
        ((b"MoEf", 2, 1, 3, 0, 0, 1, 1, 0), "version is 2"),
        ((b"MoEf", 1, 2, 3, 0, 0, 1, 1, 0), "kind code is 2"),
        ((b"MoEf", 1, 1, 9, 0, 0, 1, 1, 0), "row format code 9"),
        ((b"MoEf", 1, 1, 3, 0, 0, 1, 0, 0), "hidden size is 0"),
        ((b"MoEf", 1, 1, 3, 0, 0, 2, 1, 0), "header announces 40"),
    ],
)
def test_the_failed_check_is_named(fields: tuple[bytes | int, ...], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        decode_dispatch(sealed(struct.pack("<4sBBBxIIIII", *fields), bytes(4)), LIMITS)


def test_a_combine_frame_carries_neither_int8_nor_pairs() -> None:
    for row_format, num_pairs in ((1, 0), (3, 1)):
        fields = struct.pack("<4sBBBxIIIII", b"MoEf", 1, 2, row_format, 0, 0, 1, 1, num_pairs)
        with pytest.raises(ClusterError, match=r"row format|pairs"):
            decode_combine(sealed(fields, bytes(5 + 7 * num_pairs)), LIMITS)


@pytest.mark.parametrize(
    ("expert_ids", "row_indices", "message"),
    [
        ([0, 1], [0, 2], "row indices reach from 0 to 2"),
        ([0, 1], [-1, 0], "row indices reach from -1"),
        ([1, 0], [0, 0], "ascending"),
        ([-1, 0], [0, 0], "negative"),
    ],
)
def test_pairs_that_name_nothing_are_refused_on_both_sides(
    expert_ids: list[int], row_indices: list[int], message: str
) -> None:
    frame = DispatchFrame(0, 0, torch.ones(2, 1), torch.tensor(expert_ids).int(), torch.tensor(row_indices).int())
    with pytest.raises(ShapeError, match=message):
        encode(frame)
    body = struct.pack("<4i2f", *expert_ids, *row_indices, 1.0, 1.0)
    with pytest.raises(ClusterError, match=message):
        decode_dispatch(sealed(struct.pack("<4sBBBxIIIII", b"MoEf", 1, 1, 3, 0, 0, 2, 1, 2), body), LIMITS)


def test_frames_of_wrong_shapes_or_dtypes_are_refused() -> None:
    ids = torch.zeros(2, dtype=torch.int32)
    int8_rows, float_rows = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 3)
    wrong: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = [
        (float_rows[0], ids, ids, None),
        (float_rows[:, :0], ids, ids, None),
        (float_rows.double(), ids, ids, None),
        (float_rows, ids, ids, torch.ones(2, 1)),
        (int8_rows, ids, ids, None),
        (int8_rows, ids, ids, torch.ones(2)),
        (int8_rows, ids, ids, torch.ones(2, 1).half()),
        (float_rows, ids.long(), ids, None),
        (float_rows, ids, ids[:1], None),
        (float_rows, ids.reshape(1, 2), ids, None),
    ]
    for rows, expert_ids, row_indices, scales in wrong:
        with pytest.raises(ShapeError, match="DispatchFrame"):
            DispatchFrame(0, 0, rows, expert_ids, row_indices, scales)
    with pytest.raises(ShapeError, match="CombineFrame"):
        CombineFrame(0, 0, int8_rows)
    for layer_index, epoch in ((-1, 0), (0, 2**32)):
        with pytest.raises(ConfigError, match=r"layer_index|epoch"):
            CombineFrame(layer_index, epoch, float_rows)


def test_payload_metadata_and_header_are_told_apart() -> None:
    frame = dispatch_frame(7, 33, 20, torch.int8)
    assert (payload_bytes(frame), metadata_bytes(frame), HEADER_BYTES) == (7 * 37, 20 * 8, 32)
    assert payload_bytes(dispatch_frame(7, 33, 20, torch.float16)) == 7 * 66
    assert payload_bytes(CombineFrame(0, 0, torch.zeros(20, 33))) == 20 * 132
