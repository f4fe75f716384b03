"""What a peer offers to a benchmark: feed one token, feed a prompt, let go."""

from collections.abc import Callable
from typing import Protocol

from benchmarks.timing import Timing, median_time
from moe_bitnet.errors import MoEBitNetError


class PeerMissingError(MoEBitNetError):
    """A peer's optional packages are not installed; the benchmark goes on without it."""


class Peer(Protocol):
    """A model of a :class:`benchmarks.peers.shape.SyntheticShape` that can be timed."""

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""

    def prefill(self, num_tokens: int) -> object:
        """Forget the sequence, and start another with ``num_tokens`` tokens in one batch."""

    def decode_token(self) -> object:
        """Append one token and score the next. A full sequence first falls back to its prompt."""

    def close(self) -> None:
        """Free the memory."""


def prefill_call(peer: Peer, num_tokens: int) -> Callable[[], object]:
    """Return ``peer.prefill(num_tokens)`` as a function without arguments, as timing needs it."""
    return lambda: peer.prefill(num_tokens)


def time_decode(peer: Peer, *, prompt_len: int = 32, num_tokens: int = 32) -> Timing:
    """Time single tokens after a prompt; tokens/s is ``1 / median_s``."""
    peer.prefill(prompt_len)
    return median_time(peer.decode_token, num_runs=num_tokens)


def time_prefill(peer: Peer, *, num_tokens: int = 512, num_runs: int = 3) -> Timing:
    """Time a prompt in one batch; tokens/s is ``num_tokens / median_s``."""
    return median_time(prefill_call(peer, num_tokens), num_runs=num_runs, num_warmups=1)
