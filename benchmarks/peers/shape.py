"""The sizes of a dense LLaMA-like model, all that a speed measurement needs to know of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SyntheticShape:
    """Sizes of a model with random weights.

    Attributes:
        num_layers: L, transformer blocks.
        hidden_size: H, width of the residual stream.
        intermediate_size: F, inner width of the feed-forward layer.
        num_heads: N, query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: D, width of one head.
        vocab_size: V, rows of the embedding and of the head, which are not tied.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def num_body_weights(self) -> int:
        """Weights of all projections in the blocks: those that a ternary model makes ternary."""
        attention_width = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (attention_width + 3 * self.intermediate_size)

    @property
    def num_head_weights(self) -> int:
        """Weights of the output projection; the embedding has as many, of which a token reads one row."""
        return self.vocab_size * self.hidden_size


BITNET_2B4T_BODY = SyntheticShape(
    num_layers=30,
    hidden_size=2560,
    intermediate_size=6912,
    num_heads=20,
    num_kv_heads=5,
    head_dim=128,
    vocab_size=32_000,
)
"""The blocks of BitNet b1.58 2B4T (arXiv:2504.12285), with the vocabulary of LLaMA-2."""
