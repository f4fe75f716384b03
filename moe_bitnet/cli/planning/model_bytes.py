"""What the parts of a model weigh that a placement moves about: one expert, all that is shared, and the cache.

Models of this project are weighed tensor by tensor; others by the arithmetic of their shape, in the layouts of
:mod:`moe_bitnet.packing` with a scale for each matrix.
"""

from kvcache.memory import bytes_for_tokens
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS, cache_config
from moe_bitnet.cli.planning.model_shape import WEIGHT_BITS, ModelShape
from moe_bitnet.cli.planning.model_source import ModelSource
from moe_bitnet.errors import ConfigError
from moe_bitnet.packing import Layout, check_layout, packed_width

WEIGHT_FORMATS = ("fp16", "2bit", "base3")
"""Formats of experts: the float twin, and the ternary layouts."""

_SCALE_BYTES = 4


def expert_bytes(source: ModelSource, weights: str) -> int:
    """Return the bytes of one routed expert.

    Args:
        source: the model.
        weights: one of ``WEIGHT_FORMATS``.
    """
    layout = _layout(weights)
    if source.config is not None:
        return model_sizes(source.config.replace(precision=_precision(layout)), layout).expert_bytes
    shape = source.shape
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    if layout is None:
        return 2 * shape.num_matrices * hidden_size * intermediate_size
    inner_rows = (shape.num_matrices - 1) * intermediate_size * packed_width(hidden_size, layout)  # gate and up
    return inner_rows + hidden_size * packed_width(intermediate_size, layout) + shape.num_matrices * _SCALE_BYTES


def shared_bytes(source: ModelSource, weights: str, shared_bits: str | None) -> int:
    """Return the bytes of all that is no routed expert: embedding, head, attention, dense layers, shared experts.

    Args:
        source: the model.
        weights: format of the experts; with ``"fp16"`` all is in 16 bits.
        shared_bits: a key of ``WEIGHT_BITS`` for the matrices of a ternary model, with embedding, head, routers and
            norms at 16 bits; ``None`` is 16 bits for all, or what ``moe-bitnet pack`` writes of this project's models.
    """
    layout = _layout(weights)
    if source.config is not None and (shared_bits is None or layout is None):
        return model_sizes(source.config.replace(precision=_precision(layout)), layout).home_bytes
    bits = WEIGHT_BITS[shared_bits] if shared_bits and layout else 16
    return round(source.shape.num_shared_weights * bits / 8) + 2 * source.shape.num_other_weights


def shared_precision(source: ModelSource, shared_bits: str | None) -> str:
    """Say in which precision :func:`shared_bytes` counts a ternary model, for people."""
    if shared_bits is None:
        return "16 bits" if source.config is None else "as packed"
    bits = f"{shared_bits} bits" if shared_bits.isdigit() else f"ternary {shared_bits}"
    return "16 bits" if shared_bits == "16" else f"{bits}, tables 16 bits"


def kv_bytes(shape: ModelShape, num_tokens: int, format_name: str) -> int:
    """Return the bytes of one sequence's cache.

    Args:
        shape: the model's sizes.
        num_tokens: length of the sequence; 0 is no cache.
        format_name: a key of ``CACHE_FORMATS``.
    Raises:
        ConfigError: an unknown format, heads that pages cannot hold, or latent vectors in another format than FP16.
    """
    if format_name not in CACHE_FORMATS:
        raise ConfigError(f"--kv-format is {format_name!r}; allowed are {', '.join(CACHE_FORMATS)}.")
    if num_tokens == 0:
        return 0
    if shape.latent is None:
        return bytes_for_tokens(cache_config(shape, format_name), num_tokens)
    if format_name != "FP16":
        raise ConfigError(
            f"--kv-format is {format_name}, but the model caches latent vectors (MLA), which pages of this format "
            f"cannot hold. Use FP16."
        )
    return 2 * shape.num_layers * shape.latent.cached_size * num_tokens


def _layout(weights: str) -> Layout | None:
    return None if weights == "fp16" else check_layout(weights)


def _precision(layout: Layout | None) -> str:
    return "float" if layout is None else "ternary"
