import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_factories import DTYPES, dispatch_frame, rows_of

from cluster.transport.codec import decode, encode
from cluster.transport.frames import (
    HEADER_BYTES,
    CombineFrame,
    DispatchFrame,
    ProbeFrame,
    RefusalFrame,
    metadata_bytes,
    padding_bytes,
    payload_bytes,
)
from cluster.transport.header import FrameLimits
from cluster.transport.row_format import Combine
from moe_bitnet.errors import ConfigError, FrameError, ShapeError

LIMITS = FrameLimits()
COMBINES = [Combine(mode, row_format) for mode in ("rows", "partial_sums") for row_format in DTYPES]
HEADER = {
    "magic": b"MoEf",
    "version": 2,
    "kind": 1,
    "row_format": 3,
    "detail": 0x13,
    "layer": 0,
    "hidden": 1,
    "epoch": 0,
    "request_id": 0,
    "num_rows": 1,
    "num_pairs": 1,
}


def sealed(body, **changes):
    """A frame with a right checksum around whatever it says: one float32 row of one value for expert 0, by default."""
    fields = struct.pack("<4sBBBBHHIIII", *{**HEADER, **changes}.values())
    return fields + struct.pack("<I", zlib.crc32(body, zlib.crc32(fields))) + body


GOOD_BODY = struct.pack("<HHfB", 0, 0, 1.0, 1)  # expert 0, padding, the row, one expert


def assert_same(left, right):
    assert (left is None) == (right is None)
    if left is not None:
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


# --- Round trips


@pytest.mark.parametrize("combine", COMBINES, ids=lambda each: f"{each.mode}-{each.row_format}")
@pytest.mark.parametrize("row_format", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden_size"), [(0, 1), (1, 1), (7, 33), (33, 7)])
def test_decode_inverts_encode_for_dispatch(num_rows, hidden_size, row_format, combine):
    for pairs in ((1,), (3, 1, 2), (2,)):  # odd and even numbers of pairs
        frame = dispatch_frame(num_rows, hidden_size, row_format, combine, pairs)
        encoded = encode(frame, request_id=2**32 - 1)
        assert len(encoded) == HEADER_BYTES + payload_bytes(frame) + metadata_bytes(frame) + padding_bytes(frame)
        received = decode(encoded, LIMITS)
        assert received.request_id == 2**32 - 1
        decoded = received.frame
        assert (decoded.layer_index, decoded.epoch, decoded.combine) == (3, 41, combine)
        for name in ("rows", "scales", "expert_ids", "pairs_per_row", "expert_weights"):
            assert_same(getattr(decoded, name), getattr(frame, name))
        assert encode(decoded, 2**32 - 1) == encoded


@pytest.mark.parametrize("row_format", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33)])
def test_decode_inverts_encode_for_combine(shape, row_format):
    frame = CombineFrame(2**16 - 1, 2**32 - 1, *rows_of(row_format, *shape))
    encoded = encode(frame, request_id=9)
    assert len(encoded) == HEADER_BYTES + payload_bytes(frame)
    received = decode(encoded, LIMITS)
    assert (received.request_id, received.frame.layer_index, received.frame.epoch) == (9, 2**16 - 1, 2**32 - 1)
    assert_same(received.frame.rows, frame.rows)
    assert_same(received.frame.scales, frame.scales)


@pytest.mark.parametrize("reason", ["protocol", "stale plan", "request", "failure"])
@pytest.mark.parametrize("message", ["", "no such expert", "ein Ärgernis — 専門家"])
def test_decode_inverts_encode_for_refusals(reason, message):
    frame = RefusalFrame(reason, message, epoch=7)
    received = decode(encode(frame, 5), LIMITS)
    assert (received.frame, received.request_id) == (frame, 5)


def test_decode_inverts_encode_for_probes():
    encoded = encode(ProbeFrame(epoch=2**32 - 1), 3)
    assert len(encoded) == HEADER_BYTES
    received = decode(encoded, LIMITS)
    assert (received.frame, received.request_id) == (ProbeFrame(2**32 - 1), 3)


@pytest.mark.parametrize("message", ["x" * 5000, "ä" * 5000, "\ud800" + "x" * 5000])
def test_a_message_of_any_length_and_any_characters_travels_in_4096_bytes(message):
    encoded = encode(RefusalFrame("failure", message))
    assert len(encoded) <= HEADER_BYTES + 4096
    assert decode(encoded, LIMITS).frame.message[1:100] == message[1:100]


def test_values_that_are_not_finite_pass_bit_for_bit():
    rows = torch.tensor([[float("nan"), float("inf"), -0.0]])
    decoded = decode(encode(CombineFrame(0, 0, rows)), LIMITS).frame
    assert torch.equal(decoded.rows.view(torch.int32), rows.view(torch.int32))


def test_strided_tensors_are_encoded_as_their_values():
    frame = dispatch_frame(7, 33, "float32")
    rows = torch.empty(33, 14).T[::2].copy_(frame.rows).requires_grad_()
    ids, counts, weights = (
        torch.stack([part, part], dim=1)[:, 0] for part in (frame.expert_ids, frame.pairs_per_row, frame.expert_weights)
    )
    strided = DispatchFrame(3, 41, rows, None, ids, counts, weights, frame.combine)
    assert not any(part.is_contiguous() for part in (rows, ids, counts, weights))
    assert encode(strided) == encode(frame)


def test_float32_parts_are_aligned_in_an_aligned_buffer():
    """Unaligned, they would have to be copied, or be read slowly."""
    for row_format in DTYPES:
        for pairs in ((1,), (3, 1, 2)):
            buffer = bytearray(encode(dispatch_frame(7, 33, row_format, pairs=pairs)))
            decoded = decode(buffer, LIMITS).frame
            for part in (decoded.rows, decoded.scales, decoded.expert_weights):
                assert part is None or part.data_ptr() % part.element_size() == 0
            start = np.frombuffer(buffer, np.uint8).ctypes.data
            assert start < decoded.rows.data_ptr() < start + len(buffer)  # a view


def test_a_writable_buffer_is_viewed_and_any_other_copied_without_warnings():
    frame = dispatch_frame(7, 33)
    encoded = encode(frame)
    shifted = memoryview(bytearray(b"x" + encoded))[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for buffer in (encoded, bytearray(encoded), memoryview(encoded), shifted):
            decoded = decode(buffer, LIMITS).frame
            assert_same(decoded.scales, frame.scales)
            decoded.rows.zero_()
    assert encode(frame) == encoded
    viewed = bytearray(encoded)
    decode(viewed, LIMITS).frame.rows.zero_()
    assert viewed != encoded


def test_the_layout_of_a_frame_is_pinned():
    frame = DispatchFrame(
        layer_index=0x0102,
        epoch=0x03040506,
        rows=torch.tensor([[1, -1, 2], [3, -128, 127]], dtype=torch.int8),
        scales=torch.tensor([[1.0], [0.5]]),
        expert_ids=torch.tensor([7, 0x0809, 65535]),
        pairs_per_row=torch.tensor([1, 2]),
        expert_weights=torch.tensor([1.0, 0.25, -2.0]),
        combine=Combine("partial_sums", "bfloat16"),
    )
    expected = (
        "4d6f4566 02 01 01 24 0201 0300 06050403 0d0c0b0a 02000000 03000000 64a70222"
        "0000803f 0000803e 000000c0"  # expert weights
        "0000803f 0000003f"  # scales
        "0700 0908 ffff 0000"  # expert ids, one of padding
        "01ff02 03807f"  # rows
        "01 02"  # experts a row
    )
    assert encode(frame, 0x0A0B0C0D).hex() == expected.replace(" ", "")


# --- Damage


@pytest.mark.parametrize("row_format", DTYPES)
def test_every_truncation_and_extension_is_refused(row_format):
    encoded = encode(dispatch_frame(3, 7, row_format))
    for length in range(len(encoded)):
        with pytest.raises(FrameError, match="frame refused"):
            decode(encoded[:length], LIMITS)
    with pytest.raises(FrameError, match="header announces"):
        decode(encoded + b"\0", LIMITS)


@pytest.mark.parametrize(
    "frame",
    [dispatch_frame(3, 7), CombineFrame(1, 2, torch.ones(3, 7)), RefusalFrame("request", "no"), ProbeFrame(4)],
    ids=lambda each: type(each).__name__,
)
def test_every_changed_bit_is_caught(frame):
    encoded = encode(frame, 77)
    for position in range(8 * len(encoded)):
        altered = bytearray(encoded)
        altered[position // 8] ^= 1 << position % 8
        with pytest.raises(FrameError, match="frame refused"):
            decode(altered, LIMITS)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(buffer):
    with pytest.raises(FrameError, match="frame refused"):
        decode(buffer, LIMITS)


_COUNT = st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1))


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([0, 1, 3, 0x11, 0x13, 0x21, 0x24, 0x25, 0x31]),
    st.integers(0, 3),
    _COUNT,
    _COUNT,
    st.one_of(st.binary(max_size=80), st.just(GOOD_BODY), st.integers(0, 80).map(bytes)),
)
def test_any_claim_with_a_right_checksum_is_refused_or_a_frame_that_says_the_same(
    kind, row_format, detail, hidden, num_rows, num_pairs, body
):
    buffer = sealed(
        body,
        kind=kind,
        row_format=row_format,
        detail=detail,
        hidden=hidden,
        num_rows=num_rows,
        num_pairs=num_pairs,
    )
    try:
        received = decode(buffer, LIMITS)
    except FrameError:
        return
    if not isinstance(received.frame, RefusalFrame):  # whose message may be no UTF-8
        assert encode(received.frame, received.request_id) == buffer


def test_the_frame_that_the_next_tests_falsify_is_good():
    frame = decode(sealed(GOOD_BODY), LIMITS).frame
    assert (frame.rows.item(), frame.expert_ids.item(), frame.combine) == (1.0, 0, Combine("rows", "float32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"HTTP"}, "magic is b'HTTP'"),
        ({"version": 1}, "version is 1, this program speaks 2"),
        ({"version": 3}, "version is 3"),
        ({"kind": 0}, "kind code 0"),
        ({"kind": 6}, "kind code 6"),
        ({"row_format": 0}, "row format code 0"),
        ({"row_format": 5}, "row format code 5"),
        ({"row_format": 1}, "header announces"),
        ({"detail": 0}, "combine code 0"),
        ({"detail": 0x10}, "combine code 16"),
        ({"detail": 0x15}, "combine code 21"),
        ({"detail": 0x33}, "combine code 51"),
        ({"detail": 0x23}, "header announces"),
        ({"hidden": 0}, "hidden size is 0"),
        ({"hidden": 2}, "header announces"),
        ({"num_rows": 0}, "header announces"),
        ({"num_rows": 2}, "header announces"),
        ({"num_pairs": 0}, "header announces"),
        ({"num_pairs": 3}, "header announces"),
        ({"num_pairs": 2}, "have 1 experts, 2 expert ids"),
        ({"kind": 2}, "combine code 19"),
        ({"kind": 2, "detail": 0}, "pairs: 1 given, the limit is 0"),
        ({"kind": 2, "detail": 0, "num_pairs": 0}, "header announces"),
        ({"kind": 3, "detail": 6}, "combine code 6"),
        ({"kind": 5, "detail": 1}, "combine code 1"),
        ({"kind": 3, "detail": 1}, "a refusal frame with layer 0 and rows of 1 float32 values"),
        ({"kind": 3, "detail": 1, "hidden": 0, "row_format": 1}, "rows: 1 given, the limit is 0"),
        ({"kind": 4, "detail": 1}, "combine code 1"),
        ({"kind": 4, "detail": 0, "hidden": 0}, "rows of 0 float32"),
        ({"kind": 4, "detail": 0, "row_format": 1}, "rows of 1 int8"),
        ({"kind": 4, "detail": 0, "hidden": 0, "row_format": 1, "layer": 1}, "layer 1"),
        ({"kind": 4, "detail": 0, "hidden": 0, "row_format": 1}, "rows: 1 given"),
        ({"kind": 4, "detail": 0, "hidden": 0, "row_format": 1, "num_rows": 0}, "pairs: 1 given, the limit is 0"),
    ],
    ids=str,
)
def test_each_falsified_field_is_named(changes, message):
    with pytest.raises(FrameError, match=message):
        decode(sealed(GOOD_BODY, **changes), LIMITS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (struct.pack("<HHfB", 0, 0, 1.0, 0), "have 0 experts, 1 expert ids"),
        (struct.pack("<HHfB", 0, 0, 1.0, 255), "have 255 experts, 1 expert ids"),
        (struct.pack("<HHfB", 0, 1, 1.0, 1), "padding"),
    ],
)
def test_pairs_that_do_not_add_up_are_refused(body, message):
    with pytest.raises(FrameError, match=message):
        decode(sealed(body), LIMITS)


def test_a_row_without_experts_is_refused():
    body = struct.pack("<HH2f2B", 0, 0, 1.0, 1.0, 2, 0)
    with pytest.raises(FrameError, match="a row has 0 "):
        decode(sealed(body, num_rows=2, num_pairs=2), LIMITS)


# --- Limits


@pytest.mark.parametrize("limits", [LIMITS, FrameLimits(*[2**70] * 4)], ids=["default", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_rows": 2**30},
        {"num_pairs": 2**30},
        {"num_rows": 2**32 - 1, "num_pairs": 2**32 - 1, "hidden": 2**16 - 1},
        {"kind": 2, "detail": 0, "num_pairs": 0, "num_rows": 2**30},
        {"kind": 3, "detail": 1, "num_rows": 0, "hidden": 0, "row_format": 1, "num_pairs": 2**32 - 1},
    ],
    ids=str,
)
def test_huge_claims_are_refused_before_memory_is_taken(changes, limits):
    buffer = sealed(GOOD_BODY, **changes)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="frame refused"):
            decode(buffer, limits)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (FrameLimits(max_frame_bytes=357), "frame bytes: 358 given, the limit is 357"),
        (FrameLimits(max_num_rows=6), "rows: 7 given, the limit is 6"),
        (FrameLimits(max_hidden_size=32), "hidden size: 33 given, the limit is 32"),
        (FrameLimits(max_num_pairs=9), "pairs: 10 given, the limit is 9"),
    ],
)
def test_a_frame_over_a_limit_is_refused_with_the_limit(limits, message):
    encoded = encode(dispatch_frame(7, 33, pairs=(1, 2)))
    with pytest.raises(FrameError, match=message):
        decode(encoded, limits)
    decode(encoded, FrameLimits(max_frame_bytes=358, max_num_rows=7, max_hidden_size=33, max_num_pairs=10))


# --- Frames


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(3)}, "rows are"),
        ({"rows": torch.zeros(2, 0)}, "rows are"),
        ({"rows": torch.zeros(2, 2**16)}, "at most 65535 values"),
        ({"rows": torch.zeros(2, 3).double()}, "float64"),
        ({"rows": torch.zeros(2, 3, dtype=torch.int8)}, "no scales"),
        ({"scales": torch.ones(2, 1)}, "came with scales"),
        ({"rows": torch.zeros(2, 3, dtype=torch.int8), "scales": torch.ones(2)}, "scales are"),
        ({"rows": torch.zeros(2, 3, dtype=torch.int8), "scales": torch.ones(2, 1).half()}, "scales are"),
        ({"expert_ids": torch.tensor([0, 1, 2]).int()}, "expert_ids are"),
        ({"expert_ids": torch.tensor([[0, 1, 2]])}, "expert_ids are"),
        ({"expert_ids": torch.tensor([0, 1])}, "have 3 experts, 2 expert ids"),
        ({"expert_ids": torch.tensor([0, 1, -1])}, "from -1 to 1"),
        ({"expert_ids": torch.tensor([0, 1, 2**16])}, "0 to 65536"),
        ({"pairs_per_row": torch.tensor([3])}, "pairs_per_row are"),
        ({"pairs_per_row": torch.tensor([3, 0])}, "0 to 3 experts"),
        ({"pairs_per_row": torch.tensor([4, -1])}, "-1 to 4 experts"),
        ({"expert_weights": torch.ones(3)}, "expert weights"),
        ({"combine": Combine("partial_sums")}, "expert weights"),
        ({"combine": Combine("partial_sums"), "expert_weights": torch.ones(2)}, "expert_weights are"),
        ({"combine": Combine("partial_sums"), "expert_weights": torch.ones(3).half()}, "expert_weights are"),
    ],
    ids=str,
)
def test_a_dispatch_frame_of_wrong_shapes_dtypes_or_values_cannot_be_made(changes, message):
    good = {
        "layer_index": 0,
        "epoch": 0,
        "rows": torch.zeros(2, 3),
        "scales": None,
        "expert_ids": torch.tensor([0, 1, 2]),
        "pairs_per_row": torch.tensor([1, 2]),
        "expert_weights": None,
        "combine": Combine("rows"),
    }
    DispatchFrame(**good)
    with pytest.raises(ShapeError, match=message):
        DispatchFrame(**{**good, **changes})


def test_256_experts_a_row_are_one_too_many():
    pairs = torch.zeros(256, dtype=torch.int64)
    with pytest.raises(ShapeError, match="allowed are 1 to 255"):
        DispatchFrame(0, 0, torch.zeros(1, 1), None, pairs, torch.tensor([256]), None, Combine("rows"))
    frame = DispatchFrame(0, 0, torch.zeros(1, 1), None, pairs[1:], torch.tensor([255]), None, Combine("rows"))
    assert decode(encode(frame), LIMITS).frame.pairs_per_row.tolist() == [255]


@pytest.mark.parametrize(("layer_index", "epoch"), [(-1, 0), (2**16, 0), (0, -1), (0, 2**32)])
def test_numbers_that_do_not_fit_a_header_are_refused(layer_index, epoch):
    with pytest.raises(ConfigError, match=r"layer_index|epoch"):
        CombineFrame(layer_index, epoch, torch.zeros(2, 3))


def test_a_combine_frame_gives_its_rows_in_float32():
    rows, scales = rows_of("int8", 3, 7)
    assert torch.equal(CombineFrame(0, 0, rows, scales).values(), rows.float() * scales)
    half = rows_of("bfloat16", 3, 7)[0]
    assert torch.equal(CombineFrame(0, 0, half).values(), half.float())
