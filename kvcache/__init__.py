"""A paged, quantized KV cache under a byte budget: one sequence's keys and values at 16, 8 or 4 bits.

Reading order: ``config`` (sizes and bytes), ``page`` (where each byte lies), ``codec`` (what each byte means),
``transform`` and ``codebook`` (the mathematics of the codec), ``pool`` and ``recent`` (the memory),
``online_softmax`` (attention by tiles), ``cache`` (all of it together), ``memory`` (how many tokens fit).
"""

from kvcache.cache import QuantizedKVCache
from kvcache.config import KVCacheConfig

__all__ = ["KVCacheConfig", "QuantizedKVCache"]
