"""Caches of tiny sizes for tests, filled with tokens whose keys and values are known, and a look into their pages."""

import torch

from kvcache import KVCacheConfig, codec
from kvcache.cache import PagedKVCache
from kvcache.memory import bytes_for_tokens
from kvcache.page import PAGE_SIZE

NUM_LAYERS = 2
NUM_KV_HEADS = 2
HEAD_DIM = 16


def make_config(key_bits=16, value_bits=16, **changes):
    sizes = {"num_layers": NUM_LAYERS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
    return KVCacheConfig(**{**sizes, "key_bits": key_bits, "value_bits": value_bits, **changes})


def make_cache(config, num_tokens, num_sequences=1):
    """A cache with no byte more than sequences of ``num_tokens`` tokens need."""
    return PagedKVCache(config, bytes_for_tokens(config, num_tokens, num_sequences), num_sequences=num_sequences)


def without_attention(cache):
    """Let a cache store tokens and compute nothing: the queries are its outputs."""
    cache._paged_attention = lambda layer_format, frame, query, key, value, batch: query
    return cache


def vectors(num_tokens, num_heads=NUM_KV_HEADS, seed=0, head_dim=HEAD_DIM):
    return torch.randn(num_tokens, num_heads, head_dim, generator=torch.Generator().manual_seed(seed))


_TABLE = vectors(3 * 7 * 64, seed=1234).half().view(3, 7, 64, NUM_KV_HEADS, HEAD_DIM)  # layer, position, token


def keys_of(token_ids, layer_index, first_position=0):
    """What a model might give: a float16 key ``[T, G, D]`` that depends on token, position and layer."""
    positions = torch.arange(first_position, first_position + len(token_ids))
    return _TABLE[layer_index, positions % 7, torch.tensor(list(token_ids), dtype=torch.int64)]


def values_of(token_ids, layer_index, first_position=0):
    return -keys_of(token_ids, layer_index, first_position).flip(-1)


def append(cache, sequence_ids, chunks, layers=None):
    """One step: append to each sequence its chunk of token ids, to all layers or to some."""
    starts = [cache.length(sequence_id) for sequence_id in sequence_ids]
    for layer_index in range(cache.config.num_layers) if layers is None else layers:
        key, value = (
            torch.cat([make(chunk, layer_index, start) for chunk, start in zip(chunks, starts, strict=True)])
            for make in (keys_of, values_of)
        )
        cache.extend(layer_index, sequence_ids, key, key, value, [len(chunk) for chunk in chunks])


def stored(cache, sequence_id, layer_index):
    """Keys and values that a layer of a sequence reads, float32 ``[T, G, D]`` each; packed pages in their frame."""
    table, layer = cache._tables[sequence_id], cache._format.layers[layer_index]
    parts = []
    for page_index in range(-(-table.length // PAGE_SIZE)):
        if table.num_sink_pages <= page_index < table.sealed_ends[layer_index]:
            parts.append(codec.decode_layer(layer, packed_layer(cache, sequence_id, layer_index, page_index)))
        else:
            exact = cache._planes.layer_bytes(layer_index, int(table.exact_ids[page_index]))
            parts.append(codec.read_exact_layer(layer, exact))
    if not parts:
        return torch.empty(2, 0, NUM_KV_HEADS, HEAD_DIM)
    return torch.stack(
        [torch.cat(planes, dim=1).transpose(0, 1)[: table.length] for planes in zip(*parts, strict=True)]
    )


def packed_layer(cache, sequence_id, layer_index, page_index):
    """The bytes of one layer of a packed page."""
    start = cache._format.layer_offset(layer_index)
    page = cache._packed.memory[int(cache._tables[sequence_id].packed_ids[page_index])]
    return page[start : start + cache._format.layers[layer_index].layer_bytes]


def assert_holds(cache, sequence_id, token_ids):
    """A cache of 16 bits holds exactly the keys and values of these tokens, in every layer."""
    assert cache.length(sequence_id) == len(token_ids)
    for layer_index in range(cache.config.num_layers):
        expected = torch.stack((keys_of(token_ids, layer_index), values_of(token_ids, layer_index)))
        assert torch.equal(stored(cache, sequence_id, layer_index), expected.float())


def dense_attention(query, key, value, scale=None):
    """Causal attention ``[T, N, D]`` of the last T tokens with the whole score matrix, float64."""
    query, key, value = (x.transpose(0, 1).double() for x in (query, key, value))
    is_visible = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
    output = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=is_visible, enable_gqa=True, scale=scale
    )
    return output[0].transpose(0, 1)


class DictTier:
    """The plainest PageTier."""

    def __init__(self):
        self.kept = {}

    def write(self, pages, metadata):
        handle = len(self.kept)
        self.kept[handle] = (pages.clone(), dict(metadata))
        return handle

    def read(self, handle):
        return self.kept[handle]
