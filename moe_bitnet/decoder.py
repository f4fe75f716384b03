"""One sequence through a packed model on the CPU: a step is one call of the C++ library.

Token ids enter, the logits of the next token leave. Keys and values are held in float16 in one buffer for
``max_tokens`` tokens. The same numbers as :class:`moe_bitnet.MoETransformer` gives with a float16 cache, but for the
order of float sums in attention, router and head; the ternary products are the same integers.

Python is entered once a step, so at batch 1 the step runs at the speed of memory.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from moe_bitnet.attention import Attention
from moe_bitnet.bitlinear import PackedBitLinear
from moe_bitnet.errors import BackendError, CacheFullError, CheckpointError, ConfigError, ShapeError
from moe_bitnet.experts import PackedExperts
from moe_bitnet.kernels.backend_cpp import load_kernel_library
from moe_bitnet.kernels.decoder_structures import CacheStructure, LayerStructure, ModelStructure, TableStructure
from moe_bitnet.kernels.structures import (
    ExpertsStructure,
    MatricesStructure,
    experts_structure,
    matrices_structure,
    require_cpu,
)
from moe_bitnet.layers import RMSNorm, rotary_tables
from moe_bitnet.model import Block, MoETransformer
from moe_bitnet.packed_module import arrange_weights
from moe_bitnet.table import TABLE_FORMATS, Table, TableFormat, make_table
from moe_bitnet.tiles import TiledTernary

TOKENS_PER_TILE = 64  # of the key buffer; csrc/attention.h draws it
MAX_TOKENS = 2**24
"""The rotary embedding takes positions in float32, which holds every integer up to here."""
_LANES = 16
_PHASES = ("products", "attention", "head", "other")


@dataclass(frozen=True)
class DecoderProfile:
    """Where the time of the last calls went, in seconds.

    Attributes:
        products_s: ternary products, with the activation and quantization between expert projections.
        attention_s: attention over the held tokens.
        head_s: final norm and head.
        other_s: norms, quantization, routing, rotary embedding, waiting of threads for each other.
    """

    products_s: float
    attention_s: float
    head_s: float
    other_s: float

    @property
    def total_s(self) -> float:
        """Seconds inside the library."""
        return self.products_s + self.attention_s + self.head_s + self.other_s


class PackedDecoder:
    """A packed model and the keys and values of one sequence.

    The threads are those that torch has when it is made. Weights are shared with ``model``; tables of another format
    than the model's are copies, so a model that is dropped afterwards frees its float embedding. Several decoders may
    run at once in different Python threads; one decoder takes one call at a time.

    Args:
        model: packed (:func:`moe_bitnet.pack_model`, or a packed checkpoint), on the CPU, with its own experts.
        max_tokens: the longest sequence; its buffer is allocated at once.
        table_format: of embedding and head: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        max_chunk_tokens: most tokens of a prompt that are computed together; scratch memory grows with it.

    Raises:
        CheckpointError: the model is not packed, or its experts are elsewhere.
        ConfigError: sizes that cannot be.
        BackendError: the C++ library is absent, or there is no memory.
    """

    def __init__(
        self,
        model: MoETransformer,
        max_tokens: int,
        table_format: TableFormat = "float32",
        max_chunk_tokens: int = 256,
    ) -> None:
        if not 1 <= max_tokens <= MAX_TOKENS or max_chunk_tokens < 1:
            raise ConfigError(
                f"PackedDecoder: max_tokens is {max_tokens} and max_chunk_tokens {max_chunk_tokens}; "
                f"give 1 to {MAX_TOKENS} tokens, and chunks of at least 1."
            )
        if table_format not in TABLE_FORMATS:
            raise ConfigError(f"PackedDecoder: table_format is {table_format!r}; allowed: {', '.join(TABLE_FORMATS)}.")
        self._require_packed(model)
        arrange_weights(model)
        self.config = model.config
        self.max_tokens = max_tokens
        self.table_format: TableFormat = table_format
        self._max_rows = min(max_chunk_tokens, max_tokens)
        self._length = 0
        self._kept: list[object] = []  # whatever the library has a pointer to
        self._expert_bytes = 0  # one routed expert of every layer
        self._library = load_kernel_library()
        self._handle: int | None = None
        structure = self._model_structure(model)
        cache = self._cache_structure()
        self._kept += [structure, cache]
        self._handle = self._library.ternary_decoder_create(
            ctypes.byref(structure), ctypes.byref(cache), self._max_rows, torch.get_num_threads()
        )
        if not self._handle:
            raise BackendError(
                f"PackedDecoder: no memory for chunks of {self._max_rows} tokens. Lower max_chunk_tokens."
            )

    @property
    def length(self) -> int:
        """Tokens that are held."""
        return self._length

    @property
    def cache_bytes(self) -> int:
        """Bytes of the buffers for keys and values, used or not."""
        return self._key.nbytes + self._value.nbytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that a step may read: ternary, tables, norms and routers."""
        tensors = [kept for kept in self._kept if isinstance(kept, Tensor)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def active_weight_bytes(self) -> int:
        """Bytes of the weights that one token reads: its experts alone, the head, and one row of the embedding."""
        config = self.config
        idle_experts = config.num_experts - config.top_k
        table_bytes = self._embedding.num_bytes
        row_bytes = table_bytes // config.vocab_size
        idle_table_bytes = 0 if config.has_tied_embeddings else table_bytes - row_bytes
        return self.weight_bytes - idle_experts * self._expert_bytes - idle_table_bytes

    def append(self, token_ids: Sequence[int]) -> Tensor:
        """Add tokens to the sequence and score the one after them.

        Args:
            token_ids: at least one.
        Returns:
            logits, float32 ``[vocab_size]``. A key or value that float16 cannot hold (beyond 65504) becomes infinite
            there, as in any float16 cache, and the logits after it NaN.
        Raises:
            ShapeError: no tokens, no integers, or ids beyond the vocabulary; nothing has changed.
            CacheFullError: more than ``max_tokens``; nothing has changed.
        """
        ids = torch.tensor(token_ids)
        is_valid = ids.dtype == torch.int64 and ids.dim() == 1 and len(ids) > 0
        if not is_valid or int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise ShapeError(
                f"PackedDecoder.append: {list(token_ids)[:8]} are no token ids; give at least one, "
                f"each from 0 to {self.config.vocab_size - 1}."
            )
        if self._length + len(token_ids) > self.max_tokens:
            raise CacheFullError(
                f"PackedDecoder.append: {len(token_ids)} tokens after {self._length} exceed max_tokens "
                f"{self.max_tokens}. Make the decoder for more, or truncate it."
            )
        logits = torch.empty(self.config.vocab_size)
        for start in range(0, len(token_ids), self._max_rows):
            chunk = ids[start : start + self._max_rows]
            is_last = start + self._max_rows >= len(token_ids)
            self._library.ternary_decoder_append(
                self._handle, chunk.data_ptr(), len(chunk), self._length, logits.data_ptr() if is_last else None
            )
            self._length += len(chunk)
        return logits

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on.

        Raises:
            ConfigError: fewer tokens are held.
        """
        if not 0 <= length <= self._length:
            raise ConfigError(f"PackedDecoder.truncate: length is {length}; {self._length} tokens are held.")
        self._length = length

    def moe_layer(self, layer_index: int, hidden_states: Tensor) -> Tensor:
        """Run one MoE layer alone, with its norm, router, experts and residual connection.

        Args:
            layer_index: which layer.
            hidden_states: float32 ``[num_tokens, hidden_size]``.
        Returns:
            ``hidden_states + layer(hidden_states)``, float32 ``[num_tokens, hidden_size]``.
        Raises:
            ShapeError: another shape, or more tokens than ``max_chunk_tokens``.
        """
        sizes = hidden_states.shape
        is_valid = len(sizes) == 2 and 1 <= sizes[0] <= self._max_rows and sizes[1] == self.config.hidden_size
        if not is_valid or not 0 <= layer_index < self.config.num_layers:
            raise ShapeError(
                f"PackedDecoder.moe_layer: layer {layer_index}, hidden_states {list(sizes)}; give a layer below "
                f"{self.config.num_layers} and [1 to {self._max_rows}, {self.config.hidden_size}]."
            )
        output = hidden_states.detach().to(torch.float32).contiguous().clone()
        self._library.ternary_decoder_moe_layer(self._handle, layer_index, sizes[0], output.data_ptr())
        return output

    def profile(self) -> DecoderProfile:
        """Return where the time went since the last call of this."""
        seconds = (ctypes.c_double * len(_PHASES))()
        self._library.ternary_decoder_profile(self._handle, seconds)
        return DecoderProfile(*seconds)

    def __reduce__(self) -> NoReturn:
        raise TypeError("PackedDecoder owns memory of the library: it cannot be copied or pickled. Make another one.")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.ternary_decoder_destroy(self._handle)
            self._handle = None

    @staticmethod
    def _require_packed(model: MoETransformer) -> None:
        if model.config.has_float_backbone:
            raise CheckpointError(
                "PackedDecoder: the model has a float backbone (attention and shared experts), the library computes "
                "packed ones alone. Use the model itself."
            )
        for block in model.blocks:
            assert isinstance(block, Block)
            if not isinstance(block.attention.o_proj, PackedBitLinear) or not isinstance(
                block.moe.experts, PackedExperts
            ):
                raise CheckpointError(
                    "PackedDecoder: the model is not packed, or its experts are elsewhere. Give one of pack_model, "
                    "or a packed checkpoint (moe-bitnet pack)."
                )

    def _model_structure(self, model: MoETransformer) -> ModelStructure:
        config = model.config
        layers = (LayerStructure * config.num_layers)()
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            layers[index] = self._layer_structure(block)
        embedding = self._embedding = make_table(model.embedding.weight, self.table_format)
        head = embedding if config.has_tied_embeddings else make_table(model.lm_head.weight, self.table_format)
        return ModelStructure(
            config.num_layers,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.vocab_size,
            config.num_experts,
            config.top_k,
            config.num_shared_experts,
            config.norm_eps,
            layers,
            self._table_structure(embedding),
            self._table_structure(head),
            self._float_pointer(model.norm.weight),
        )

    def _layer_structure(self, block: Block) -> LayerStructure:
        attention, moe = block.attention, block.moe
        assert isinstance(attention.o_proj.norm, RMSNorm)
        shared = self._experts(moe.shared_experts) if moe.num_shared_experts else ExpertsStructure()
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return LayerStructure(
            *(self._matrix(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            self._norm_pointer(attention.norm),
            *(self._norm_pointer(projection.norm) for projection in projections),
            self._norm_pointer(attention.o_proj.norm),
            self._norm_pointer(moe.norm),
            self._float_pointer(moe.router.weight),
            self._routed_experts(moe.experts),
            shared,
        )

    def _matrix(self, attention: Attention, name: str) -> MatricesStructure:
        tiled = getattr(attention, name).matrix("weight")
        assert isinstance(tiled, TiledTernary)
        self._kept += [tiled.tiles, tiled.weight_scale]
        return matrices_structure(tiled)

    def _experts(self, experts: object) -> ExpertsStructure:
        assert isinstance(experts, PackedExperts)
        weights = experts.weights
        for matrix in (weights.gate, weights.up, weights.down):
            assert isinstance(matrix, TiledTernary)
            self._kept += [matrix.tiles, matrix.weight_scale]
        self._kept.append(weights.norm_weight)
        return experts_structure(weights)

    def _routed_experts(self, experts: object) -> ExpertsStructure:
        assert isinstance(experts, PackedExperts)
        weights = experts.weights
        held_bytes = weights.gate.num_bytes + weights.up.num_bytes + weights.down.num_bytes + weights.norm_weight.nbytes
        self._expert_bytes += held_bytes // experts.num_experts
        return self._experts(experts)

    def _norm_pointer(self, norm: nn.Module) -> int | None:
        return self._float_pointer(norm.weight) if isinstance(norm, RMSNorm) else None

    def _float_pointer(self, tensor: Tensor) -> int:
        values = tensor.detach().to(torch.float32).contiguous()
        require_cpu("a norm or router", values, torch.float32)
        self._kept.append(values)
        return values.data_ptr()

    def _table_structure(self, table: Table) -> TableStructure:
        tensors = [table.values, table.row_scale, table.row_sum]
        self._kept += [tensor for tensor in tensors if tensor is not None]
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return TableStructure(*pointers, TABLE_FORMATS.index(self.table_format))

    def _cache_structure(self) -> CacheStructure:
        config = self.config
        padded_dim = -(-config.head_dim // _LANES) * _LANES
        num_tiles = -(-self.max_tokens // TOKENS_PER_TILE)
        heads = (config.num_layers, config.num_kv_heads)
        try:
            self._key = torch.zeros(*heads, num_tiles, padded_dim, TOKENS_PER_TILE, dtype=torch.float16)
            self._value = torch.zeros(*heads, num_tiles * TOKENS_PER_TILE, padded_dim, dtype=torch.float16)
        except RuntimeError as error:  # what torch raises when memory is refused
            raise BackendError(
                f"PackedDecoder: no memory for keys and values of {self.max_tokens} tokens. Lower max_tokens."
            ) from error
        positions = torch.arange(num_tiles * TOKENS_PER_TILE)
        self._rotary = [
            table.squeeze(1).contiguous() for table in rotary_tables(positions, config.head_dim, config.rope_theta)
        ]
        pointers = (tensor.data_ptr() for tensor in (self._key, self._value, *self._rotary))
        return CacheStructure(*pointers, num_tiles * TOKENS_PER_TILE)
