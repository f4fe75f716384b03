"""From tensors to the launches of attention: queries, packed pages, float16 pages and new tokens, merge.

Arguments have passed :mod:`kvcache.kernels.triton.operations`. Nothing here waits for the GPU: grids follow from
shapes.

Beyond the cache, memory holds the partial results: ``num_splits`` slots for packed pages and one more for the others,
each as large as the output. Many rows make many tiles, hence one split; many splits are made only for few rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.frame import LayerFrame
from kvcache.kernels.batch import PagedBatch
from kvcache.kernels.triton.exact import exact_kernel
from kvcache.kernels.triton.layout import (
    LINE_BYTES,
    key_segments,
    num_digit_columns,
    padded_head_dim,
    page_constants,
    power_of_two,
)
from kvcache.kernels.triton.merge import merge_kernel
from kvcache.kernels.triton.packed import packed_kernel
from kvcache.kernels.triton.plan import WIDE, Plan, make_plan
from kvcache.kernels.triton.queries import query_kernel
from kvcache.kernels.triton.tables import level_table, scale_table
from kvcache.page import LayerFormat

INTERPRETED_MULTIPROCESSORS = 4
"""Plans for tensors on the CPU, which Triton's interpreter runs, are those of a tiny GPU."""


@dataclass(frozen=True)
class PreparedQuery:
    """The queries of a call in the forms of ``queries.py``, by query: token times query heads."""

    high: Tensor
    low: Tensor
    unit: Tensor
    digits: Tensor
    digit_units: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Partials:
    """Running softmaxes of all splits: ``[slots, queries]`` twice, and ``[slots, queries, head_dim]``."""

    maxima: Tensor
    weight_sums: Tensor
    value_sums: Tensor


def plan_for(layer_format: LayerFormat, query: Tensor, batch: PagedBatch) -> Plan:
    """Cut a call for the device of its queries."""
    num_multiprocessors, capability_major = INTERPRETED_MULTIPROCESSORS, 9
    if query.is_cuda:
        device = torch.cuda.get_device_properties(query.device)
        num_multiprocessors, capability_major = device.multi_processor_count, device.major
    return make_plan(
        num_tokens=query.shape[0],
        num_sequences=batch.row_offsets.numel() - 1,
        num_pages=batch.page_ids.numel(),
        group=query.shape[1] // layer_format.num_kv_heads,
        num_kv_heads=layer_format.num_kv_heads,
        head_dim=layer_format.head_dim,
        num_multiprocessors=num_multiprocessors,
        capability_major=capability_major,
    )


def launch_attention(
    layer_format: LayerFormat,
    frame: LayerFrame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: PagedBatch,
    plan: Plan,
) -> Tensor:
    """Attend; arguments as those of the operation, contiguous and on one device.

    Returns:
        float32 ``[num_tokens, num_heads, head_dim]``.
    """
    output = torch.empty_like(query)
    num_queries = query.shape[0] * query.shape[1]
    num_slots = 2 * plan.num_splits + 1
    partials = Partials(
        query.new_empty((num_slots, num_queries)),
        query.new_empty((num_slots, num_queries)),
        query.new_empty((num_slots, num_queries, query.shape[2])),
    )
    with torch.cuda.device_of(query):
        prepared = _prepare(layer_format, frame, query, batch.scale)
        _launch_packed(layer_format, query, prepared, batch, partials, plan)
        _launch_exact(layer_format, key, value, prepared, batch, partials, plan)
        _launch_merge(layer_format, frame, partials, output, plan)
    return output


def _prepare(layer_format: LayerFormat, frame: LayerFrame, query: Tensor, scale: float) -> PreparedQuery:
    num_tokens, num_heads, head_dim = query.shape
    num_queries = num_tokens * num_heads
    constants = page_constants(layer_format)
    segments = key_segments(layer_format.key)
    prepared = PreparedQuery(
        high=torch.empty((num_queries, head_dim), dtype=torch.float16, device=query.device),
        low=torch.empty((num_queries, head_dim), dtype=torch.float16, device=query.device),
        unit=query.new_empty(num_queries),
        digits=torch.empty((num_queries, num_digit_columns(segments)), dtype=torch.int8, device=query.device),
        digit_units=query.new_empty((num_queries, max(1, len(segments)))),
        offset=query.new_empty(num_queries),
    )
    group = num_heads // layer_format.num_kv_heads
    num_rows = num_tokens * group
    block_rows = _mapped_rows(num_rows, head_dim)
    query_kernel[(-(-num_rows // block_rows), layer_format.num_kv_heads)](
        query,
        frame.key.decode_matrix,
        frame.key.mean,
        prepared.high,
        prepared.low,
        prepared.unit,
        prepared.digits,
        prepared.digit_units,
        prepared.offset,
        scale,
        num_rows,
        NUM_HEADS=num_heads,
        GROUP=group,
        BLOCK_ROWS=block_rows,
        **{name: constants[name] for name in ("HEAD_DIM", "HEAD_DIM_PADDED", "KEY_SEGMENTS", "NUM_DIGITS")},
        num_warps=8 if head_dim > WIDE else 4,
        enable_fp_fusion=False,
    )
    return prepared


def _launch_packed(
    layer_format: LayerFormat, query: Tensor, prepared: PreparedQuery, batch: PagedBatch, partials: Partials, plan: Plan
) -> None:
    num_heads = query.shape[1]
    packed_kernel[(plan.num_tiles, layer_format.num_kv_heads, plan.num_splits)](
        prepared.high,
        prepared.low,
        prepared.unit,
        prepared.digits,
        prepared.digit_units,
        prepared.offset,
        batch.packed,
        batch.packed.view(torch.int32),
        batch.packed.view(torch.float16),
        level_table(query.device),
        scale_table(query.device),
        batch.row_offsets,
        batch.page_offsets,
        batch.page_ids,
        batch.page_is_packed,
        batch.page_num_tokens,
        partials.maxima,
        partials.weight_sums,
        partials.value_sums,
        batch.row_offsets.numel() - 1,
        prepared.unit.numel(),
        plan.num_splits,
        batch.packed.stride(0) // LINE_BYTES,
        batch.packed_layer_offset // LINE_BYTES,
        NUM_HEADS=num_heads,
        GROUP=num_heads // layer_format.num_kv_heads,
        BLOCK_ROWS=plan.tile.block_rows,
        MAX_SEQUENCES=max(2, power_of_two(batch.row_offsets.numel() - 1)),
        **page_constants(layer_format),
        num_warps=plan.tile.num_warps,
        enable_fp_fusion=False,
    )


def _launch_exact(
    layer_format: LayerFormat,
    key: Tensor,
    value: Tensor,
    prepared: PreparedQuery,
    batch: PagedBatch,
    partials: Partials,
    plan: Plan,
) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    num_queries = prepared.unit.numel()
    num_heads = num_queries // num_tokens
    exact_kernel[(plan.num_tiles, num_kv_heads, plan.num_splits + 1)](
        prepared.high,
        prepared.low,
        prepared.unit,
        key,
        value,
        batch.exact.view(torch.float16),
        batch.row_offsets,
        batch.page_offsets,
        batch.page_ids,
        batch.page_is_packed,
        batch.page_num_tokens,
        partials.maxima,
        partials.weight_sums,
        partials.value_sums,
        batch.row_offsets.numel() - 1,
        num_queries,
        plan.num_splits,
        batch.exact.stride(0) // LINE_BYTES,
        batch.exact_layer_offset // LINE_BYTES,
        plan.num_splits,
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded_head_dim(head_dim),
        BLOCK_ROWS=plan.tile.block_rows,
        MAX_SEQUENCES=max(2, power_of_two(batch.row_offsets.numel() - 1)),
        num_warps=plan.tile.num_warps,
        num_stages=1 if head_dim > WIDE else 2,  # a stage of 128 channels takes 32 KiB of shared memory
        enable_fp_fusion=False,
    )


def _launch_merge(layer_format: LayerFormat, frame: LayerFrame, partials: Partials, output: Tensor, plan: Plan) -> None:
    num_tokens, num_heads, head_dim = output.shape
    group = num_heads // layer_format.num_kv_heads
    num_rows = num_tokens * group
    block_rows = _mapped_rows(num_rows, head_dim)
    merge_kernel[(-(-num_rows // block_rows), layer_format.num_kv_heads)](
        partials.maxima,
        partials.weight_sums,
        partials.value_sums,
        frame.value.decode_matrix,
        frame.value.mean,
        output,
        num_rows,
        num_tokens * num_heads,
        plan.num_splits,
        2 * plan.num_splits + 1,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded_head_dim(head_dim),
        IS_MAPPED=layer_format.value.num_bits < 16,
        BLOCK_ROWS=block_rows,
        num_warps=8 if head_dim > WIDE else 4,
        enable_fp_fusion=False,
    )


def _mapped_rows(num_rows: int, head_dim: int) -> int:
    """Return the rows of a tile of the kernels that multiply by a frame's matrix."""
    return 16 if num_rows <= 64 or head_dim > WIDE else 32
