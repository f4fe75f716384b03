"""Caches of each format filled with a run's validation text to their last token: tokens held, and the PPL of each."""

from typing import Any

import numpy as np
import torch

from cluster.training.batches import validation_batches
from cluster.training.shards import load_tokens
from kvcache import KVCacheConfig, QuantizedKVCache
from kvcache.memory import max_tokens
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.cli.threads import single_thread
from moe_bitnet.errors import CacheFullError, DataError
from moe_bitnet.evaluation import perplexity, token_losses
from moe_bitnet.files import write_json_atomically
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import Layout
from moe_bitnet.units import format_bytes

FORMATS = {"fp16": 16, "8-bit": 8, "4-bit": 4, "2-bit": 2}
MAX_COMMON_WINDOWS = 24


@single_thread()
def fill_caches(run_folder: RunFolder, budget_bytes: int, layout: Layout) -> dict[str, Any]:
    """Fill a cache of each format with validation text until it is full."""
    model = load_model(run_folder.require_checkpoint(run_folder.packed(layout), "pack"))
    tokens = torch.from_numpy(load_tokens(run_folder.data, "validation").astype("int64"))
    config = model.config
    windows = [
        torch.from_numpy(np.append(inputs[0], targets[0, -1]))
        for inputs, targets in validation_batches(tokens.numpy(), 1, config.max_seq_len, MAX_COMMON_WINDOWS)
    ]
    formats = [
        _measure(
            name,
            KVCacheConfig(config.num_layers, config.num_kv_heads, config.head_dim, bits, bits),
            budget_bytes,
            model,
            tokens,
            windows,
        )
        for name, bits in FORMATS.items()
    ]
    result = {
        "budget_bytes": budget_bytes,
        "model": f"ternary {layout}, {config.num_layers} layers, {config.num_kv_heads} KV heads of {config.head_dim}",
        "trained_seq_len": config.max_seq_len,
        "common_num_tokens": len(windows) * config.max_seq_len,
        "formats": formats,
    }
    write_json_atomically(run_folder.json_file("context"), result)
    return result


def _measure(
    name: str,
    cache_config: KVCacheConfig,
    budget_bytes: int,
    model: MoETransformer,
    tokens: torch.Tensor,
    windows: list[torch.Tensor],
) -> dict[str, Any]:
    """Score the windows, the same for all formats, then fill the cache to its last token."""
    num_tokens = max_tokens(cache_config, budget_bytes)
    if len(tokens) < num_tokens + 1:
        raise DataError(
            f"context: the validation text has {len(tokens)} tokens, {num_tokens + 1} are needed to fill "
            f"{format_bytes(budget_bytes)}. Give a smaller --memory, or build data from more text."
        )
    cache = QuantizedKVCache(cache_config, budget_bytes)
    window_losses = []
    for window in windows:
        window_losses.append(token_losses(model, window, cache))
        cache.free()
    with progress_bar(f"{name} cache", num_tokens) as bar:
        losses = token_losses(
            model, tokens[: num_tokens + 1], cache, on_chunk=lambda done: bar.update(done, f"{done} tokens")
        )
    assert cache.length == num_tokens
    _check_full(model, cache, tokens[num_tokens : num_tokens + 1])
    result = {
        "format": name,
        "effective_bits": cache_config.effective_bits,
        "num_tokens": num_tokens,
        "allocated_bytes": cache.allocated_bytes,
        "bytes_per_token": cache.allocated_bytes / num_tokens,
        "ppl_common": perplexity(torch.cat(window_losses)),
        "ppl_all": perplexity(losses),
    }
    budget, ppl = format_bytes(budget_bytes), result["ppl_common"]
    say(f"{name}: {num_tokens} tokens in {budget}, PPL {ppl:.2f} within the trained length")
    return result


@torch.inference_mode()
def _check_full(model: MoETransformer, cache: QuantizedKVCache, token: torch.Tensor) -> None:
    """See that the cache was filled to its last token: one more is refused."""
    try:
        model(token[None], cache)
    except CacheFullError:
        return
    raise AssertionError("the cache took a token beyond max_tokens")
