"""A paged, quantized KV cache under a byte budget: keys and values at 16, 8, 4 or 2 bits.

Reading order: ``config`` (sizes and bytes), ``page`` (where each byte lies), ``codec`` (what each byte means) with
``frame``, ``trellis`` and ``scale`` (its mathematics), ``calibration`` (frames made for a model) with ``moments`` and
``old_attention`` (what is kept of a text), ``cache`` (sequences that are appended and attended) with ``page_store``,
``page_table``, ``pool`` and ``prefix`` (the memory), ``kernels`` (the same arithmetic in C++ and Triton), ``memory``
(how many tokens fit), ``page_file`` (pages on disk), ``quality`` (what a format costs), ``hf`` (for Hugging Face
models).
"""

from kvcache.cache import QuantizedKVCache
from kvcache.config import KVCacheConfig

__all__ = ["KVCacheConfig", "QuantizedKVCache"]
