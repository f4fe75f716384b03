import kvcache


def test_public_names_are_pinned():
    assert sorted(kvcache.__all__) == ["KVCacheConfig", "QuantizedKVCache"]
