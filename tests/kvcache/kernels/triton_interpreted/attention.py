"""Attention in Triton's interpreter against the reference; run by ``test_triton_interpreted.py`` in its own process.

Pages hold random codes: every bit pattern of codes is a page. The memory around pages and layers holds noise.
"""

import dataclasses
import itertools

import pytest
import torch
from page_factories import WIDTHS, layer_format, skewed_layer_frame

from kvcache.frame import LayerFrame, PlaneFrame
from kvcache.kernels import backend_reference
from kvcache.kernels.batch import PagedBatch
from kvcache.kernels.triton.operations import paged_attention
from kvcache.kernels.triton.plan import TILES, Tile, choose_tile, make_plan
from kvcache.page import PAGE_SIZE
from moe_bitnet.errors import ShapeError

PACKED_OFFSET, EXACT_OFFSET = 128, 64
LAST_TOKENS = 17
"""Tokens of the last page of a sequence."""


def random_floats(num_pages, num_bytes):
    return torch.randn(num_pages, num_bytes // 2).half().view(torch.uint8)


def packed_pages(layer, num_pages):
    pages = torch.randint(256, (num_pages, PACKED_OFFSET + layer.layer_bytes + 64), dtype=torch.uint8)
    heads = pages[:, PACKED_OFFSET:-64].unflatten(1, (layer.num_kv_heads, layer.head_bytes))
    start = 0
    for plane in (layer.key, layer.value):
        for head in range(layer.num_kv_heads):
            if plane.num_bits == 16:
                heads[:, head, start : start + plane.code_bytes] = random_floats(num_pages, plane.code_bytes)
            else:
                codes = torch.randint(100, 130, (num_pages, PAGE_SIZE), dtype=torch.uint8)
                heads[:, head, start + plane.code_bytes : start + plane.plane_bytes] = codes
        start += plane.plane_bytes
    return pages


def make_call(layer, num_packed=(2,), num_new=(1,), group=2):
    """Arguments: every sequence has a sink page, packed pages, a full float16 page and one that is not full.

    ``None`` instead of a number of packed pages: the sequence has no past.
    """
    num_pages = sum(count or 0 for count in num_packed)
    exact_bytes = 4 * layer.num_kv_heads * PAGE_SIZE * layer.head_dim
    exact = random_floats(3 * len(num_packed), EXACT_OFFSET + exact_bytes + 64)
    packed_ids, exact_ids = torch.randperm(max(1, num_pages)).tolist(), torch.randperm(len(exact)).tolist()
    ids, is_packed, counts, page_offsets = [], [], [], [0]
    for count in num_packed:
        if count is not None:
            ids += [exact_ids.pop(), *(packed_ids.pop() for _ in range(count)), exact_ids.pop(), exact_ids.pop()]
            is_packed += [0] + [1] * count + [0, 0]
            counts += [PAGE_SIZE] * (count + 2) + [LAST_TOKENS]
        page_offsets.append(len(ids))
    batch = PagedBatch(
        packed=packed_pages(layer, max(1, num_pages)),
        exact=exact,
        packed_layer_offset=PACKED_OFFSET,
        exact_layer_offset=EXACT_OFFSET,
        row_offsets=torch.tensor([0, *itertools.accumulate(num_new)]),
        page_offsets=torch.tensor(page_offsets),
        page_ids=torch.tensor(ids, dtype=torch.int32),
        page_is_packed=torch.tensor(is_packed, dtype=torch.uint8),
        page_num_tokens=torch.tensor(counts, dtype=torch.int32),
        scale=layer.head_dim**-0.5,
    )
    shape = (sum(num_new), layer.num_kv_heads, layer.head_dim)
    query = torch.randn(sum(num_new), layer.num_kv_heads * group, layer.head_dim)
    return layer, skewed_layer_frame(layer), query, torch.randn(shape), torch.randn(shape), batch


def assert_same(actual, expected, tolerance=1e-4):
    """Only the order of float sums and exp differ.

    A number on the boundary between two digits may fall to either side of it. One of the 16256 of a query for 8-bit
    keys changes a row by less than 1e-4, which is common. One of the 127 of other queries, or of the 255 of a page's
    weights, changes it by more, which is rare.
    """
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).max()
    assert float(error.max()) <= 1 / 255
    assert float((error > tolerance).float().mean()) <= 0.05


def plan_with(call, **choice):
    layer, _, query, _, _, batch = call
    return make_plan(
        num_tokens=query.shape[0], num_sequences=batch.row_offsets.numel() - 1, num_pages=batch.page_ids.numel(),
        group=query.shape[1] // layer.num_kv_heads, num_kv_heads=layer.num_kv_heads, head_dim=layer.head_dim,
        num_multiprocessors=4, **choice,
    )  # fmt: skip


@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_every_width_equals_the_reference(key_bits, value_bits, is_calibrated):
    call = make_call(layer_format(2, 64, key_bits, value_bits, is_calibrated), (2, 1), (1, 2))
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


@pytest.mark.parametrize("widths", [(8, 8), (4, 4), (2, 2)])
def test_without_a_rotation_digits_are_those_of_the_reference(widths):
    # a query in a frame of the identity is rounded by nobody before it becomes digits
    layer, _, *rest = make_call(layer_format(1, 64, *widths), (3,), (5,))
    identity = PlaneFrame(torch.zeros(1, 64), torch.eye(64)[None], torch.eye(64)[None], torch.ones(1, 1))
    frame = LayerFrame(identity, identity)
    expected = backend_reference.paged_attention(layer, frame, *rest)
    assert_same(paged_attention(layer, frame, *rest), expected, tolerance=2e-6)


@pytest.mark.parametrize("num_bits", [8, 4, 2])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_every_head_size_equals_the_reference(head_dim, num_bits):
    call = make_call(layer_format(1, head_dim, num_bits, num_bits, is_calibrated=True), (2,), (2,))
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


@pytest.mark.parametrize("group", [1, 3, 8])
def test_any_number_of_query_heads_shares_a_key(group):
    call = make_call(layer_format(2, 32, 4, 4), (2, None, 1), (1, 1, 1), group)
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


@pytest.mark.parametrize(("block_rows", "num_splits"), [(8, 3), (16, 1), (32, 9)])
def test_tiles_and_splits_change_nothing_but_rounding(block_rows, num_splits):
    call = make_call(layer_format(1, 32, 4, 2), (4, 0), (3, 13), group=3)
    plan = plan_with(call, tile=Tile(block_rows, 4), num_splits=num_splits)
    assert_same(paged_attention(*call, plan=plan), backend_reference.paged_attention(*call))


@pytest.mark.parametrize("num_new", [64, 65, 130])
def test_new_tokens_see_each_other_causally(num_new):
    call = make_call(layer_format(1, 32, 4, 4), (1, None), (num_new, 2))
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


def test_a_long_sequence_is_split_and_its_float16_pages_are_found():
    call = make_call(layer_format(1, 16, 4, 4), (140,), (1,))
    assert plan_with(call).num_splits > 1
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


def test_a_first_prompt_has_no_pages():
    call = make_call(layer_format(1, 32, 4, 4), (None,), (5,))
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


def test_scores_far_apart_do_not_overflow():
    layer, frame, query, *rest = make_call(layer_format(1, 32, 8, 8), (2,), (1,))
    actual = paged_attention(layer, frame, query * 300, *rest)
    expected = backend_reference.paged_attention(layer, frame, query * 300, *rest)
    assert bool(actual.isfinite().all())
    assert float((actual - expected).norm()) <= 1e-3 * float(expected.norm())  # scores of 10^4 have 10^-3 in float32


def test_queries_of_zero_average_the_values():
    layer, frame, query, *rest = make_call(layer_format(1, 32, 4, 4), (1,), (2,))
    query.zero_()
    assert_same(
        paged_attention(layer, frame, query, *rest), backend_reference.paged_attention(layer, frame, query, *rest)
    )


def test_no_tokens_give_no_rows():
    call = make_call(layer_format(1, 32, 4, 4), (1, 1), (0, 0))
    assert paged_attention(*call).shape == (0, 2, 32)


def test_a_sequence_without_new_tokens_is_passed_over():
    call = make_call(layer_format(1, 32, 4, 4), (1, 2, 1), (1, 0, 2))
    assert_same(paged_attention(*call), backend_reference.paged_attention(*call))


def test_what_does_not_fit_is_refused():
    layer, frame, query, key, value, batch = make_call(layer_format(2, 32, 4, 4))
    refused = {
        "query, key and value have shapes": (query[:, :3], key, value, batch),
        "2 KV heads of 32 channels": (query, key[:, :1], value, batch),
        "packed is torch.int8": (query, key, value, dataclasses.replace(batch, packed=batch.packed.view(torch.int8))),
        "exact is torch.uint8": (query, key, value, dataclasses.replace(batch, exact=batch.exact[:, 1:])),
        "begins at byte 65": (query, key, value, dataclasses.replace(batch, exact_layer_offset=65)),
    }
    for message, arguments in refused.items():
        with pytest.raises(ShapeError, match=message):
            paged_attention(layer, frame, *arguments)


def test_plans_cover_all_rows_and_splits_are_few():
    for num_tokens, num_sequences, group, major in itertools.product([1, 7, 900], [1, 3], [1, 3, 8], [8, 9, 10, 12]):
        plan = make_plan(
            num_tokens=max(num_tokens, num_sequences), num_sequences=num_sequences, num_pages=2000, group=group,
            num_kv_heads=8, head_dim=128, num_multiprocessors=132, capability_major=major,
        )  # fmt: skip
        rows = [(max(num_tokens, num_sequences) - num_sequences + 1) * group] + [group] * (num_sequences - 1)
        assert plan.num_tiles >= sum(-(-count // plan.tile.block_rows) for count in rows)
        assert 1 <= plan.num_splits <= 64
    assert choose_tile(10**6, 256, 9).block_rows == 16
    assert choose_tile(3, 64, 8) == TILES[8][0]
