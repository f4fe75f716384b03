"""What planning knows of a model: the sizes that decide its weights, its cache and its intermediate results."""

from dataclasses import dataclass

WEIGHT_BITS: dict[str, float] = {"16": 16, "8": 8, "4": 4, "2bit": 2, "base3": 1.6}
"""Bits of a weight in the layers' matrices, scales and padding left out; the last two are ternary."""


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of attention that caches one latent vector a token instead of keys and values (MLA).

    Attributes:
        query_latent_size: width that queries pass through; 0 if they do not.
        kv_latent_size: width of the cached vector, without the part that carries positions.
        rope_head_dim: cached values that carry positions, shared by all heads.
        plain_head_dim: the rest of a query's or key's head.
        value_head_dim: width of a value's head.

    Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
    """

    query_latent_size: int
    kv_latent_size: int
    rope_head_dim: int
    plain_head_dim: int
    value_head_dim: int

    @property
    def cached_size(self) -> int:
        """Values cached a token and layer."""
        return self.kv_latent_size + self.rope_head_dim

    def num_weights(self, hidden_size: int, num_heads: int) -> int:
        """Return the weights of a layer's projections."""
        query_size = num_heads * (self.plain_head_dim + self.rope_head_dim)
        query = (hidden_size + query_size) * self.query_latent_size or hidden_size * query_size
        keys_and_values = self.kv_latent_size * num_heads * (self.plain_head_dim + self.value_head_dim)
        output = num_heads * self.value_head_dim * hidden_size
        return query + hidden_size * self.cached_size + keys_and_values + output


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with full causal attention, dense or a mixture of experts.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: G, key/value heads.
        head_dim: D.
        intermediate_size: F, inner width of the feed-forward layer or of one expert.
        num_experts: E, routed experts of a layer; 1 is a dense layer.
        top_k: K, experts that a token visits.
        shared_intermediate_size: inner width of what every token visits beside the routed experts.
        num_dense_layers: layers with a feed-forward layer of ``dense_intermediate_size`` in place of experts.
        dense_intermediate_size: see there.
        has_gate: the feed-forward layer has three matrices rather than two.
        has_tied_embeddings: the head is the embedding.
        max_seq_len: positions that the model was made for; 0 if unknown.
        latent: sizes of latent attention; ``None`` if keys and values of heads are cached.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int = 1
    top_k: int = 1
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0
    dense_intermediate_size: int = 0
    has_gate: bool = True
    has_tied_embeddings: bool = False
    max_seq_len: int = 0
    latent: LatentAttention | None = None

    @property
    def num_expert_layers(self) -> int:
        """Layers that hold experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_matrices(self) -> int:
        """Matrices of a feed-forward layer or expert."""
        return 3 if self.has_gate else 2

    @property
    def num_attention_weights(self) -> int:
        """Weights of one layer's projections."""
        if self.latent is not None:
            return self.latent.num_weights(self.hidden_size, self.num_heads)
        return 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def num_shared_weights(self) -> int:
        """Weights in matrices that every token visits: projections, dense layers and shared experts."""
        width = self.num_expert_layers * self.shared_intermediate_size
        width += self.num_dense_layers * self.dense_intermediate_size
        return self.num_layers * self.num_attention_weights + self.num_matrices * self.hidden_size * width

    @property
    def num_matrix_weights(self) -> int:
        """Weights of the layers' projections and experts."""
        expert = self.num_matrices * self.hidden_size * self.intermediate_size
        return self.num_shared_weights + self.num_expert_layers * self.num_experts * expert

    @property
    def num_other_weights(self) -> int:
        """Weights of embedding, head, routers, and two norms a layer."""
        tables = (1 if self.has_tied_embeddings else 2) * self.vocab_size * self.hidden_size
        routers = self.num_expert_layers * self.num_experts * self.hidden_size if self.num_experts > 1 else 0
        return tables + routers + (2 * self.num_layers + 1) * self.hidden_size

    @property
    def num_weights(self) -> int:
        """All weights; small ones, such as biases and norms of single heads, are left out."""
        return self.num_matrix_weights + self.num_other_weights

    def weight_bytes(self, weight_bits: str) -> int:
        """Return the bytes of all weights, with embedding, head, routers and norms at 16 bits.

        Args:
            weight_bits: a key of ``WEIGHT_BITS``.
        """
        return round(self.num_matrix_weights * WEIGHT_BITS[weight_bits] / 8) + 2 * self.num_other_weights

    def workspace_bytes(self, num_tokens: int) -> int:
        """Return the bytes of the intermediate results of one layer for the tokens of one pass, in float32.

        Counted are the residual stream, a norm's and a block's output, queries and attention's output, new keys and
        values, and the inner width of the experts that each token visits. What kernels and libraries need beside that
        is not: a few MB (``benchmarks.max_sequence`` measures them).
        """
        inner_size = max(
            self.top_k * self.intermediate_size + self.shared_intermediate_size, self.dense_intermediate_size
        )
        num_inner = 4 if self.has_gate else 2  # gate, its activation, up and the product
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return 4 * num_tokens * (3 * self.hidden_size + heads + num_inner * inner_size)

    @property
    def frame_bytes(self) -> int:
        """Bytes of a calibrated cache's maps: two float32 matrices for the keys and the values of every head."""
        return 2 * 2 * 4 * self.num_layers * self.num_kv_heads * self.head_dim**2
