"""What a device cannot give to weights: interpreter, workspace of one batch, and a margin.

A placement that fills a device to the last byte fails at the first batch. This module says how
much to leave free; :class:`cluster.topology.Device` subtracts it. Pure arithmetic.
"""

from moe_bitnet.errors import ConfigError

INTERPRETER_BYTES = 214 * 2**20
"""An actor that has imported torch and this package: 214 MiB, its share of shared pages included
(PSS; 308 MiB resident), Ray 2.60, torch 2.13 for the CPU. A second one on the node adds 186 MiB. On a GPU
the context takes its place: it is in what a probe finds used already."""

DEFAULT_MARGIN_BYTES = 256 * 2**20
"""Buffers of sockets, allocator slack, and what other processes of the node take later."""


def reserve_bytes(
    hidden_size: int = 0,
    intermediate_size: int = 0,
    max_tokens: int = 0,
    margin_bytes: int = DEFAULT_MARGIN_BYTES,
    interpreter_bytes: int = INTERPRETER_BYTES,
) -> int:
    """Return the bytes to keep free on a device that hosts experts.

    interpreter + T_max·(H + F)·4 + margin: a host that computes ``max_tokens`` rows at once holds a row of
    the hidden and one of the inner width in float32 for each. KV cache and shared weights of the home are not
    in here; they are the problem's ``home_bytes``.

    Args:
        hidden_size: H; 0 with the next two if the model is not known yet.
        intermediate_size: F, inner width of one expert.
        max_tokens: T_max, rows of the largest batch.
        margin_bytes: for all that is not counted.
        interpreter_bytes: of the process.
    Raises:
        ConfigError: a number is negative.
    """
    for name, value in (
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("max_tokens", max_tokens),
        ("margin_bytes", margin_bytes),
        ("interpreter_bytes", interpreter_bytes),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"reserve_bytes: {name} is {value!r}; give an integer of at least 0.")
    return interpreter_bytes + max_tokens * (hidden_size + intermediate_size) * 4 + margin_bytes
