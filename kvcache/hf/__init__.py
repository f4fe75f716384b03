"""The paged KV cache under models of Hugging Face transformers (``pip install moe-bitnet[hf]``).

    cache = paged_cache(model, budget_bytes=1 << 30, key_bits=8, value_bits=4)
    model.generate(input_ids, past_key_values=cache, max_new_tokens=100)

Reading order: ``support`` (which models), ``attention`` (what is registered in transformers), ``rows`` (batches,
padding and beams), ``cache`` (the class that ``generate`` talks to), ``calibrate`` (moments of keys and values).
"""

from kvcache.hf.cache import HFPagedCache, paged_cache
from kvcache.hf.calibrate import calibrate

__all__ = ["HFPagedCache", "calibrate", "paged_cache"]
