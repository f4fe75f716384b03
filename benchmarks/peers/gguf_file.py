"""Write a LLaMA-architecture GGUF file with random weights, one tensor at a time.

Needs the package ``gguf``. The vocabulary is declared by size alone (``no_vocab``): a speed
measurement feeds token ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.gguf_blocks import LAYOUTS, BlockFormat, random_blocks
from benchmarks.peers.shape import SyntheticShape

HeadFormat = Literal["Q8_0", "F16"]

_NORM_EPS = 1e-5
_ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class _TensorPlan:
    """A tensor before it is drawn; ``num_rows`` 0 means a norm of ``num_columns`` ones."""

    name: str
    num_rows: int
    num_columns: int
    format: str = "F32"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype({"F32": "<f4", "F16": "<f2"}.get(self.format, "u1"))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array; a row of blocks counts its bytes."""
        if self.num_rows == 0:
            return (self.num_columns,)
        if self.format not in LAYOUTS:
            return (self.num_rows, self.num_columns)
        layout = LAYOUTS[self.format]
        return (self.num_rows, self.num_columns // layout.num_weights * layout.num_bytes)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.stored_shape)) * self.dtype.itemsize


def write_synthetic_gguf(
    path: Path,
    shape: SyntheticShape,
    *,
    body_format: BlockFormat = "TQ2_0",
    head_format: HeadFormat = "Q8_0",
    max_seq_len: int = 4096,
    seed: int = 0,
) -> int:
    """Write the file and return the bytes of its weights.

    Args:
        path: the new file.
        shape: sizes; widths are multiples of the format's block.
        body_format: of all projections in the blocks.
        head_format: of the embedding and the output projection.
        max_seq_len: the context length that the file declares.
        seed: of the random codes.
    """
    import gguf

    plans = list(_plan_tensors(shape, body_format, head_format))
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _add_metadata(writer, shape, max_seq_len)
        for plan in plans:
            raw_format = gguf.GGMLQuantizationType[plan.format]
            writer.add_tensor_info(plan.name, plan.stored_shape, plan.dtype, plan.num_bytes, raw_format)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        generator = np.random.default_rng(seed)
        for plan in plans:
            writer.write_tensor_data(_draw(plan, generator))
    finally:
        writer.close()
    return sum(plan.num_bytes for plan in plans)


def _add_metadata(writer: Any, shape: SyntheticShape, max_seq_len: int) -> None:
    writer.add_name("synthetic")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(max_seq_len)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(_ROPE_BASE)
    writer.add_layer_norm_rms_eps(_NORM_EPS)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _plan_tensors(shape: SyntheticShape, body_format: str, head_format: str) -> Iterator[_TensorPlan]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield _TensorPlan("token_embd.weight", shape.vocab_size, hidden, head_format)
    for layer in range(shape.num_layers):
        prefix = f"blk.{layer}"
        yield _TensorPlan(f"{prefix}.attn_norm.weight", 0, hidden)
        yield _TensorPlan(f"{prefix}.attn_q.weight", query_width, hidden, body_format)
        yield _TensorPlan(f"{prefix}.attn_k.weight", kv_width, hidden, body_format)
        yield _TensorPlan(f"{prefix}.attn_v.weight", kv_width, hidden, body_format)
        yield _TensorPlan(f"{prefix}.attn_output.weight", hidden, query_width, body_format)
        yield _TensorPlan(f"{prefix}.ffn_norm.weight", 0, hidden)
        yield _TensorPlan(f"{prefix}.ffn_gate.weight", inner, hidden, body_format)
        yield _TensorPlan(f"{prefix}.ffn_up.weight", inner, hidden, body_format)
        yield _TensorPlan(f"{prefix}.ffn_down.weight", hidden, inner, body_format)
    yield _TensorPlan("output_norm.weight", 0, hidden)
    yield _TensorPlan("output.weight", shape.vocab_size, hidden, head_format)


def _draw(plan: _TensorPlan, generator: np.random.Generator) -> NDArray[np.generic]:
    if plan.num_rows == 0:
        return np.ones(plan.stored_shape, dtype=np.float32)
    if plan.format == "F16":
        values: NDArray[np.float32] = generator.standard_normal(plan.stored_shape, dtype=np.float32)
        return (values * np.float32(plan.num_columns**-0.5)).astype(np.float16)
    return random_blocks(plan.format, plan.num_rows, plan.num_columns, generator)  # type: ignore[arg-type]
