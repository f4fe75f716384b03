import pytest
import torch
from page_factories import WIDTHS, exact_page, layer_format, plain_layer_frame, random_tokens, skewed_layer_frame

from kvcache import codec
from kvcache.kernels.backend_reference import encode_page, paged_attention
from kvcache.kernels.batch import PagedBatch
from kvcache.page import PAGE_SIZE

NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 2, 6, 32


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


class Past:
    """Two sequences: three pages (exact, packed, partly filled), and none."""

    def __init__(self, layer, frame):
        self.num_past = 2 * PAGE_SIZE + 5
        self.key, self.value = random_tokens(layer, self.num_past + 10, seed=3)
        pages = [slice(start, min(start + PAGE_SIZE, self.num_past)) for start in range(0, self.num_past, PAGE_SIZE)]
        exact = torch.stack([exact_page(layer, self.key[page], self.value[page]) for page in pages])
        packed = torch.zeros(4, layer.layer_bytes, dtype=torch.uint8)
        encode_page(layer, frame, exact[1], packed[3])
        self.batch = PagedBatch(
            packed=packed,
            exact=exact,
            packed_layer_offset=0,
            exact_layer_offset=0,
            row_offsets=int64(0, 7, 10),
            page_offsets=int64(0, 3, 3),
            page_ids=torch.tensor([0, 3, 2], dtype=torch.int32),
            page_is_packed=torch.tensor([0, 1, 0], dtype=torch.uint8),
            page_num_tokens=torch.tensor([PAGE_SIZE, PAGE_SIZE, 5], dtype=torch.int32),
            scale=HEAD_DIM**-0.5,
        )
        self.key_seen, self.value_seen = self.key.clone(), self.value.clone()
        key_y, value_y = codec.decode_layer(layer, packed[3])
        if layer.key.num_bits < 16:
            key_y = frame.key.decode(key_y)
        if layer.value.num_bits < 16:
            value_y = frame.value.decode(value_y)
        self.key_seen[PAGE_SIZE : 2 * PAGE_SIZE] = key_y.transpose(0, 1)
        self.value_seen[PAGE_SIZE : 2 * PAGE_SIZE] = value_y.transpose(0, 1)


def causal_attention(query, key, value):
    """The definition in float64: the last tokens' queries over everything."""
    key, value = (x.double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.double().transpose(0, 1) @ key.transpose(1, 2) * HEAD_DIM**-0.5
    position = torch.arange(len(query))[:, None] + key.shape[1] - len(query)
    scores = scores.masked_fill(torch.arange(key.shape[1]) > position, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(0, 1)


# int8 queries (43 dB) and 8-bit weights (41 dB a page) beside keys and values that are taken as they were decoded
@pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)
@pytest.mark.parametrize("make_frame", [plain_layer_frame, skewed_layer_frame])
def test_attention_sees_pages_as_they_decode(key_bits, value_bits, make_frame):
    layer = layer_format(NUM_KV_HEADS, HEAD_DIM, key_bits, value_bits)
    frame = make_frame(layer)
    past = Past(layer, frame)
    query = torch.randn(10, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    new = slice(past.num_past, past.num_past + 10)
    output = paged_attention(layer, frame, query, past.key[new], past.value[new], past.batch)
    first = causal_attention(query[:7], past.key_seen[: past.num_past + 7], past.value_seen[: past.num_past + 7])
    second = causal_attention(query[7:], past.key[new][7:], past.value[new][7:])
    expected = torch.cat((first, second)).float()
    tolerance = 1e-5 if (key_bits, value_bits) == (16, 16) else 2e-2 if min(key_bits, value_bits) < 8 else 1e-3
    assert (output - expected).norm() < tolerance * expected.norm()


def test_packed_sixteen_bits_equal_exact_pages():
    layer = layer_format(NUM_KV_HEADS, HEAD_DIM, 16, 16)
    frame = plain_layer_frame(layer)
    past = Past(layer, frame)
    query = torch.randn(10, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    arguments = (query, past.key[-10:], past.value[-10:])
    output = paged_attention(layer, frame, *arguments, past.batch)
    batch = past.batch
    only_exact = type(batch)(**{**vars(batch), "page_ids": torch.tensor([0, 1, 2], dtype=torch.int32)})
    only_exact.page_is_packed[1] = 0
    torch.testing.assert_close(output, paged_attention(layer, frame, *arguments, only_exact), rtol=1e-5, atol=1e-6)
