"""Attention over pages in C++ against the plain PyTorch formula: every width, head size, instruction set."""

import gc
import weakref

import pytest
import torch
from kernel_variants import computing_with, torch_threads
from page_factories import WIDTHS, exact_page, layer_format, plain_layer_frame, random_tokens, skewed_layer_frame
from page_variants import page_variants_with

from kvcache.kernels import backend_reference, select
from kvcache.kernels.batch import PagedBatch
from kvcache.page import PAGE_SIZE
from moe_bitnet.errors import ShapeError

VARIANTS = page_variants_with("paged_attention")
NUM_KV_HEADS = 2


class Sequences:
    """Several sequences whose pages lie anywhere in two pools: first exact, then packed, the last one partly full."""

    def __init__(self, layer, frame, num_past, num_new, group_size=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pages, is_packed, counts, page_offsets = [], [], [], [0]
        for sequence, past in enumerate(num_past):
            key, value = random_tokens(layer, max(past, 1), seed=seed + sequence)
            for start in range(0, past, PAGE_SIZE):
                count = min(PAGE_SIZE, past - start)
                pages.append(exact_page(layer, key[start : start + count], value[start : start + count]))
                is_packed.append(start > 0 and count == PAGE_SIZE)
                counts.append(count)
            page_offsets.append(len(pages))
        page_ids = torch.randperm(len(pages) + 2, generator=generator)[: len(pages)].int()
        exact = torch.zeros(len(pages) + 2, 64 + exact_page(layer, *random_tokens(layer, 1)).numel(), dtype=torch.uint8)
        packed = torch.zeros(len(pages) + 2, 64 + layer.layer_bytes, dtype=torch.uint8)
        for page_id, page, packs in zip(page_ids.tolist(), pages, is_packed, strict=True):
            if packs:
                backend_reference.encode_page(layer, frame, page, packed[page_id, 64:])
            else:
                exact[page_id, 64:] = page
        self.layer, self.frame = layer, frame
        num_tokens = sum(num_new)
        self.key, self.value = random_tokens(layer, num_tokens, seed=seed + 99)
        shape = (num_tokens, layer.num_kv_heads * group_size, layer.head_dim)
        self.query = torch.randn(shape, generator=generator)
        self.batch = PagedBatch(
            packed=packed,
            exact=exact,
            packed_layer_offset=64,
            exact_layer_offset=64,
            row_offsets=torch.tensor([0, *num_new]).cumsum(0),
            page_offsets=torch.tensor(page_offsets),
            page_ids=page_ids,
            page_is_packed=torch.tensor(is_packed, dtype=torch.uint8),
            page_num_tokens=torch.tensor(counts, dtype=torch.int32),
            scale=layer.head_dim**-0.5,
        )

    def attend(self, backend):
        attention = select("paged_attention", "cpu", backend)
        return attention(self.layer, self.frame, self.query, self.key, self.value, self.batch)


def assert_same(actual, expected):
    """Integers are equal, so only the order of float sums and exp differ: a few units in the last place.

    A weight that lies on the boundary between two digits may fall to either side of it by such a unit. Then a row
    differs by one 255th of a page's largest weight; that is rare.
    """
    largest = expected.norm(dim=-1).max()
    error = (actual - expected).norm(dim=-1) / largest
    assert error.max() <= 1 / 255
    assert (error > 1e-5).float().mean() <= 0.02


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_matches_reference(variant, key_bits, value_bits, is_calibrated, head_dim):
    layer = layer_format(NUM_KV_HEADS, head_dim, key_bits, value_bits, is_calibrated)
    sequences = Sequences(layer, skewed_layer_frame(layer), num_past=(200, 0, 64), num_new=(1, 7, 2))
    with computing_with(variant):
        actual = sequences.attend(variant.backend)
    assert_same(actual, sequences.attend("reference"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("head_dim", [16, 96, 128, 256])
@pytest.mark.parametrize("num_bits", [8, 4, 2])
def test_matches_reference_for_any_head_size(variant, head_dim, num_bits):
    layer = layer_format(NUM_KV_HEADS, head_dim, num_bits, num_bits, is_calibrated=True)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(150,), num_new=(1,), group_size=4)
    with computing_with(variant):
        actual = sequences.attend(variant.backend)
    assert_same(actual, sequences.attend("reference"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 8])
def test_any_number_of_query_heads_shares_a_key(variant, group_size):
    layer = layer_format(NUM_KV_HEADS, 32, 4, 4)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(200,), num_new=(1,), group_size=group_size)
    with computing_with(variant):
        actual = sequences.attend(variant.backend)
    assert_same(actual, sequences.attend("reference"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("num_new", [33, 64, 65, 150])
def test_new_tokens_see_each_other_causally(variant, num_new):
    layer = layer_format(NUM_KV_HEADS, 32, 4, 2)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(130, 5), num_new=(num_new, 3))
    with computing_with(variant):
        actual = sequences.attend(variant.backend)
    assert_same(actual, sequences.attend("reference"))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_result_does_not_depend_on_threads_and_splits(num_threads):
    layer = layer_format(1, 32, 4, 4)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(64 * 40,), num_new=(2,))
    expected = sequences.attend("reference")
    with torch_threads(num_threads):
        assert_same(sequences.attend("cpp"), expected)


def test_scores_far_apart_do_not_overflow():
    layer = layer_format(1, 32, 8, 8)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(300,), num_new=(1,))
    sequences.query *= 300
    actual = sequences.attend("cpp")
    assert actual.isfinite().all()
    expected = sequences.attend("reference")
    assert (actual - expected).norm() <= 1e-3 * expected.norm()  # scores of 10^4 have 10^-3 in float32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda s: setattr(s, "query", s.query[:, :, :16])),
        ("query", lambda s: setattr(s, "query", s.query.double())),
        ("key", lambda s: setattr(s, "key", s.key[:1])),
        ("value", lambda s: setattr(s, "value", s.value.transpose(1, 2))),
        ("packed", lambda s: object.__setattr__(s.batch, "packed_layer_offset", 128)),
        ("offsets", lambda s: object.__setattr__(s.batch, "row_offsets", torch.tensor([0, 9]))),
        ("page_ids", lambda s: object.__setattr__(s.batch, "page_ids", s.batch.page_ids.long())),
    ],
)
def test_wrong_arguments_are_refused(name, change):
    layer = layer_format(NUM_KV_HEADS, 32, 4, 4)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(100,), num_new=(2,))
    change(sequences)
    with pytest.raises(ShapeError, match=name):
        sequences.attend("cpp")


def test_a_frame_is_let_go_when_its_cache_is():
    layer = layer_format(NUM_KV_HEADS, 32, 4, 4)
    sequences = Sequences(layer, plain_layer_frame(layer), num_past=(100,), num_new=(1,))
    sequences.attend("cpp")
    frame = weakref.ref(sequences.frame)
    del sequences
    gc.collect()
    assert frame() is None
