"""Shapes of published models, from their config files."""

from moe_bitnet.cli.planning.model_shape import LatentAttention, ModelShape

KNOWN_SHAPES = {
    "smollm2-135m": ModelShape(
        vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        intermediate_size=1536, has_tied_embeddings=True, max_seq_len=8192,
    ),
    "olmoe-1b-7b": ModelShape(
        vocab_size=50_304, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
        intermediate_size=1024, num_experts=64, top_k=8, max_seq_len=4096,
    ),
    "llama-3-8b": ModelShape(
        vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        intermediate_size=14_336, max_seq_len=8192,
    ),
    "llama-3-70b": ModelShape(
        vocab_size=128_256, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
        intermediate_size=28_672, max_seq_len=8192,
    ),
    "mixtral-8x7b": ModelShape(
        vocab_size=32_000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        intermediate_size=14_336, num_experts=8, top_k=2, max_seq_len=32_768,
    ),
    "qwen3-30b-a3b": ModelShape(
        vocab_size=151_936, hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128,
        intermediate_size=768, num_experts=128, top_k=8, max_seq_len=40_960,
    ),
    # without the layers that predict further tokens (MTP)
    "deepseek-v3": ModelShape(
        vocab_size=129_280, hidden_size=7168, num_layers=61, num_heads=128, num_kv_heads=128, head_dim=192,
        intermediate_size=2048, num_experts=256, top_k=8, shared_intermediate_size=2048, num_dense_layers=3,
        dense_intermediate_size=18_432, max_seq_len=163_840,
        latent=LatentAttention(
            query_latent_size=1536, kv_latent_size=512, rope_head_dim=64, plain_head_dim=128, value_head_dim=128,
        ),
    ),
}  # fmt: skip
