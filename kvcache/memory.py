"""How many tokens fit into how many bytes: the arithmetic that the cache itself follows.

A layer of n tokens keeps the first ``num_sink_tokens`` and the most recent ones in float16. Whenever
``num_window_tokens + page_size`` tokens have gathered behind the sinks and the sealed pages, the oldest ``page_size``
of them are sealed into a page:

    | sinks | page | page | ... | window: num_window_tokens .. num_window_tokens + page_size - 1 |

All layers grow together, so pages are spent ``num_layers`` at a time.
"""

from kvcache.config import KVCacheConfig


def num_sealed_pages(config: KVCacheConfig, num_tokens: int) -> int:
    """Count the sealed pages of one layer that holds ``num_tokens`` tokens."""
    return max(0, num_tokens - config.num_sink_tokens - config.num_window_tokens) // config.page_size


def num_pages_per_layer(config: KVCacheConfig, budget_bytes: int) -> int:
    """Count the pages that each layer can have, after the float16 region; negative if not even that one fits."""
    return (budget_bytes - config.recent_bytes) // (config.num_layers * config.page_bytes)


def max_tokens(config: KVCacheConfig, budget_bytes: int) -> int:
    """Count the tokens that a cache holds before it raises ``CacheFullError``.

    Args:
        config: sizes and formats.
        budget_bytes: bytes for everything the cache stores, float16 regions and scales included.

    Returns:
        Tokens of one sequence; 0 if the float16 region alone is larger than the budget (no cache can be made then).
    """
    num_pages = num_pages_per_layer(config, budget_bytes)
    return 0 if num_pages < 0 else config.max_recent_tokens + num_pages * config.page_size


def bytes_for_tokens(config: KVCacheConfig, num_tokens: int) -> int:
    """Compute the smallest budget whose cache holds a number of tokens.

    Args:
        config: sizes and formats.
        num_tokens: length of the sequence.

    Returns:
        Bytes; never less than the float16 region, which does not depend on the length.
    """
    return config.recent_bytes + num_sealed_pages(config, num_tokens) * config.num_layers * config.page_bytes
