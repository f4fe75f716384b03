"""How many tokens fit into how many bytes: the arithmetic that the cache itself follows.

Each of B sequences may need a fixed number of exact pages: its sinks, its tail (the window and the page that fills up)
and one that the layers are sealing. All other bytes are packed pages:

    budget = B * exact_pages_per_sequence * exact_page_bytes + num_packed_pages * page_bytes + rest

A sequence of n tokens has sealed every page behind its sinks that lies ``num_window_tokens`` or more behind its end.
"""

from kvcache.config import KVCacheConfig
from kvcache.page import PAGE_SIZE
from kvcache.page_table import sealed_end


def num_sealed_pages(config: KVCacheConfig, num_tokens: int) -> int:
    """Count the packed pages of a sequence of ``num_tokens`` tokens."""
    num_sink_pages = config.num_sink_tokens // PAGE_SIZE
    return sealed_end(num_tokens, num_sink_pages, config.num_window_tokens) - num_sink_pages


def exact_bytes(config: KVCacheConfig, num_sequences: int = 1) -> int:
    """Return the bytes of the exact pages, which a cache allocates whatever its sequences hold."""
    return num_sequences * config.exact_pages_per_sequence * config.exact_page_bytes


def num_packed_pages(config: KVCacheConfig, budget_bytes: int, num_sequences: int = 1) -> int:
    """Count the packed pages beside the exact ones; negative if not even those fit."""
    return (budget_bytes - exact_bytes(config, num_sequences)) // config.page_bytes


def max_tokens(config: KVCacheConfig, budget_bytes: int, num_sequences: int = 1) -> int:
    """Count the tokens that each of several equally long sequences holds before ``CacheFullError``.

    Args:
        config: sizes and formats.
        budget_bytes: bytes for everything that the cache stores, exact pages and scales included.
        num_sequences: B.

    Returns:
        Tokens of one sequence; 0 if the exact pages alone are larger than the budget (no cache can be made then).
    """
    num_pages = num_packed_pages(config, budget_bytes, num_sequences)
    if num_pages < 0:
        return 0
    return config.num_sink_tokens + num_pages // num_sequences * PAGE_SIZE + config.max_tail_tokens


def bytes_for_tokens(config: KVCacheConfig, num_tokens: int, num_sequences: int = 1) -> int:
    """Compute the smallest budget whose cache holds a number of tokens.

    Args:
        config: sizes and formats.
        num_tokens: length of each sequence.
        num_sequences: B.

    Returns:
        Bytes; never less than the exact pages, which do not depend on the length.
    """
    num_pages = num_sequences * num_sealed_pages(config, num_tokens)
    return exact_bytes(config, num_sequences) + num_pages * config.page_bytes
