"""The operations with the signatures of the reference: checks and launches. Nothing here waits for the GPU."""

import dataclasses

import torch
from torch import Tensor

from kvcache.frame import LayerFrame
from kvcache.kernels.batch import PagedBatch
from kvcache.kernels.checks import check_tokens
from kvcache.kernels.triton.attention import launch_attention, plan_for
from kvcache.kernels.triton.encode import launch_encode
from kvcache.kernels.triton.layout import LINE_BYTES
from kvcache.kernels.triton.plan import Plan
from kvcache.page import LayerFormat
from moe_bitnet.errors import ShapeError
from moe_bitnet.kernels.registry import Operation


def encode_page(layer_format: LayerFormat, frame: LayerFrame, exact: Tensor, packed: Tensor) -> None:
    """Twin of :func:`kvcache.kernels.backend_reference.encode_page`, byte for byte.

    Args:
        layer_format: sizes and bits.
        frame: the maps of the layer.
        exact: uint8 ``[exact layer bytes]``, contiguous: float16 planes, finite.
        packed: uint8 ``[layer_bytes]``, contiguous, written.
    """
    sizes = (layer_format.exact_layer_bytes, layer_format.layer_bytes)
    for name, x, num_bytes in zip(("exact", "packed"), (exact, packed), sizes, strict=True):
        if x.dtype != torch.uint8 or x.shape != (num_bytes,) or not x.is_contiguous() or x.storage_offset() % 4:
            raise ShapeError(
                f"encode_page: {name} is {x.dtype} {list(x.shape)} from byte {x.storage_offset()} of its memory. Give "
                f"{num_bytes} contiguous bytes of uint8 that start on a multiple of {LINE_BYTES}."
            )
    if exact.device != packed.device:
        raise ShapeError(f"encode_page: exact is on {exact.device} and packed on {packed.device}. Move one of them.")
    launch_encode(layer_format, frame.to(packed.device), exact, packed)


def paged_attention(
    layer_format: LayerFormat,
    frame: LayerFrame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: PagedBatch,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """Twin of :func:`kvcache.kernels.backend_reference.paged_attention`, with the same integers.

    Args:
        layer_format: sizes and bits of the layer.
        frame: the maps of the layer.
        query: float32 ``[T, num_heads, head_dim]``.
        key: float32 ``[T, num_kv_heads, head_dim]``.
        value: like ``key``.
        batch: the pages; offsets and page arrays may be on the CPU, but move to the device at every call then.
        plan: how to cut the call; chosen by shapes unless given.

    Returns:
        float32 ``[T, num_heads, head_dim]``.
    """
    check_tokens(layer_format, query, key, value)
    _check_devices(query, key, value)
    _check_pages(batch)
    if query.shape[0] == 0:
        return torch.empty_like(query)
    device = query.device
    query, key, value = (x.detach().to(torch.float32).contiguous() for x in (query, key, value))
    batch = dataclasses.replace(
        batch,
        row_offsets=batch.row_offsets.to(device, torch.int64).contiguous(),
        page_offsets=batch.page_offsets.to(device, torch.int64).contiguous(),
        page_ids=batch.page_ids.to(device, torch.int32).contiguous(),
        page_is_packed=batch.page_is_packed.to(device, torch.uint8).contiguous(),
        page_num_tokens=batch.page_num_tokens.to(device, torch.int32).contiguous(),
    )
    plan = plan or plan_for(layer_format, query, batch)
    return launch_attention(layer_format, frame.to(device), query, key, value, batch, plan)


def _check_devices(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.device != query.device or value.device != query.device:
        raise ShapeError(
            f"paged_attention: query is on {query.device}, key on {key.device} and value on {value.device}. "
            f"Move them to one device."
        )


def _check_pages(batch: PagedBatch) -> None:
    offsets = (batch.packed_layer_offset, batch.exact_layer_offset)
    for name, pages, offset in zip(("packed", "exact"), (batch.packed, batch.exact), offsets, strict=True):
        is_aligned = pages.stride(0) % LINE_BYTES == 0 and pages.storage_offset() % LINE_BYTES == 0
        if pages.dim() != 2 or pages.dtype != torch.uint8 or pages.stride(1) != 1 or not is_aligned:
            raise ShapeError(
                f"paged_attention: {name} is {pages.dtype} {list(pages.shape)} with strides {list(pages.stride())}. "
                f"Give uint8 [num_pages, page_bytes] whose rows start on multiples of {LINE_BYTES} bytes."
            )
        if offset % LINE_BYTES:
            raise ShapeError(
                f"paged_attention: the layer begins at byte {offset} of a page in {name}; layers begin on multiples "
                f"of {LINE_BYTES}. Take it from PageFormat.layer_offset."
            )


OPERATIONS: dict[str, Operation] = {"encode_page": encode_page, "paged_attention": paged_attention}
