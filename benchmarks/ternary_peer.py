"""Our fused decoder with the interface that the peers have."""

import time
from dataclasses import dataclass

from torch import Tensor

from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.model import MoETransformer
from moe_bitnet.table import TableFormat


@dataclass(frozen=True)
class TokenProfile:
    """Where the wall time of single tokens went, as shares of it.

    Attributes:
        outside_share: outside the library: Python and the binding.
        products_share: ternary products with what stands between them in an expert.
        attention_share: attention.
        head_share: final norm and head.
        other_share: norms, quantization, routing, rotary embedding, threads waiting for each other.
    """

    outside_share: float
    products_share: float
    attention_share: float
    head_share: float
    other_share: float


class TernaryPeer:
    """A packed model as a peer.

    Args:
        model: packed.
        table_format: of embedding and head.
        max_tokens: tokens that the cache holds.
    """

    def __init__(self, model: MoETransformer, table_format: TableFormat, max_tokens: int) -> None:
        self.decoder: PackedDecoder | None = PackedDecoder(model, max_tokens, table_format)
        self.weight_bytes = self.decoder.weight_bytes
        self.active_bytes = self.decoder.active_weight_bytes
        self._prompt_len = 0

    @property
    def _open_decoder(self) -> PackedDecoder:
        assert self.decoder is not None, "the peer is closed"
        return self.decoder

    def prefill(self, num_tokens: int) -> object:
        """Forget the sequence, and start another with ``num_tokens`` tokens."""
        decoder = self._open_decoder
        decoder.truncate(0)
        self._prompt_len = num_tokens
        return decoder.append([index * 7919 % decoder.config.vocab_size for index in range(num_tokens)])

    def decode_token(self) -> object:
        """Append one token and score the next. A full sequence first falls back to its prompt."""
        decoder = self._open_decoder
        if decoder.length >= decoder.max_tokens:
            decoder.truncate(min(self._prompt_len, decoder.max_tokens - 1))
        return decoder.append([1])

    def append(self, token_id: int) -> Tensor:
        """Append one token; returns the logits of the next, float32 ``[vocab_size]``."""
        return self._open_decoder.append([token_id])

    def profile_tokens(self, num_tokens: int) -> TokenProfile:
        """Decode some tokens and say where their time went."""
        decoder = self._open_decoder
        decoder.profile()
        start = time.perf_counter()
        for _ in range(num_tokens):
            self.decode_token()
        wall_s = time.perf_counter() - start
        profile = decoder.profile()
        return TokenProfile(
            outside_share=1 - profile.total_s / wall_s,
            products_share=profile.products_s / wall_s,
            attention_share=profile.attention_s / wall_s,
            head_share=profile.head_s / wall_s,
            other_share=profile.other_s / wall_s,
        )

    def close(self) -> None:
        """Free the memory."""
        self.decoder = None
