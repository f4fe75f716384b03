r"""Bytes that experts on other devices cost, predicted from a placement or counted from a routing.

Tokens live on the home device 0; what its own experts do costs nothing. For one token and one layer
with E experts, of which e_d on device d, and top-k routing:

    pairs   (token, expert) with the expert away from home     k · (E - e_0) / E
    visits  (token, device) with the device away from home     sum over d > 0 of 1 - C(E - e_d, k) / C(E, k)

if every set of k experts is equally likely. A routing gives both by counting. Then

    dispatch payload   visits · row with deduplication (a row travels once to a device), else pairs · row
    combine payload    pairs · row for "rows" (home sums, bit for bit as on one device),
                       visits · row for "partial_sums" (a host weighs and sums its experts' outputs)
    metadata           pairs · 8: int32 expert id and row index; for partial sums 4 more, the float32 weight

A row is 4H, 2H or, for int8 with its float32 scale, H + 4 bytes. These are the payload and metadata of
:mod:`cluster.transport.frames`. Not counted: one frame header (``HEADER_BYTES``) for each frame, at most two
frames for each device, layer and step; and TCP/IP headers. Training sends everything twice.

"partial_sums" is a model for comparison; the frames of this package carry rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

import torch
from torch import Tensor

from cluster.placement.placement import Placement
from cluster.transport.row_format import EXPERT_METADATA_BYTES, RowFormat, row_bytes
from moe_bitnet.errors import ConfigError, ShapeError

CombineMode = Literal["rows", "partial_sums"]

_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class TrafficBytes:
    """Bytes between devices, without frame headers; exact integers where they were counted.

    Attributes:
        dispatch_payload_bytes: rows and scales from home to experts.
        combine_payload_bytes: expert outputs from experts to home.
        metadata_bytes: expert ids, row indices and, for partial sums, expert weights.
    """

    dispatch_payload_bytes: float
    combine_payload_bytes: float
    metadata_bytes: float

    @property
    def total_bytes(self) -> float:
        """Payload both ways and metadata."""
        return self.dispatch_payload_bytes + self.combine_payload_bytes + self.metadata_bytes


def copies_per_token(num_experts_per_device: Sequence[int], top_k: int, has_dedup: bool) -> float:
    """Return the row copies that leave home for one token in one layer, under uniform routing.

    Args:
        num_experts_per_device: experts of the layer on each device, home first; may be uneven.
        top_k: K, experts that a token visits.
        has_dedup: one copy for each device instead of one for each expert.
    Raises:
        ConfigError: ``top_k`` is not from 1 to the number of experts.
    """
    num_experts = sum(num_experts_per_device)
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"copies_per_token: top_k is {top_k} with {num_experts} experts. Use 1 to {num_experts}.")
    away = num_experts_per_device[1:]
    if not has_dedup:
        return top_k * sum(away) / num_experts
    all_sets = comb(num_experts, top_k)
    return sum(all_sets - comb(num_experts - count, top_k) for count in away) / all_sets


def bytes_per_token(
    num_experts_per_device: Sequence[int],
    top_k: int,
    hidden_size: int,
    dispatch_row: RowFormat,
    combine_row: RowFormat,
    has_dedup: bool = True,
    combine: CombineMode = "rows",
) -> TrafficBytes:
    """Predict the bytes of one token in one layer under uniform routing.

    Args:
        num_experts_per_device: experts of the layer on each device, home first.
        top_k: K, experts that a token visits.
        hidden_size: H, values in a row.
        dispatch_row: format of rows on the way to experts.
        combine_row: format of rows on the way home; int8 counts a scale.
        has_dedup: send a row once to each device instead of once to each expert.
        combine: what comes home; ``"partial_sums"`` needs ``has_dedup``.
    Raises:
        ConfigError: impossible ``top_k``, an unknown format, or partial sums without deduplication.
    """
    return _traffic(
        num_pairs=copies_per_token(num_experts_per_device, top_k, has_dedup=False),
        num_visits=copies_per_token(num_experts_per_device, top_k, has_dedup=True),
        dispatch_row_bytes=row_bytes(hidden_size, dispatch_row),
        combine_row_bytes=row_bytes(hidden_size, combine_row),
        has_dedup=has_dedup,
        combine=combine,
    )


def expected_bytes_per_token(
    placement: Placement,
    top_k: int,
    hidden_size: int,
    dispatch_row: RowFormat,
    combine_row: RowFormat,
    has_dedup: bool = True,
    combine: CombineMode = "rows",
) -> TrafficBytes:
    """Predict the bytes of one token in all layers of a placement; arguments as in :func:`bytes_per_token`.

    Every token is taken to visit the primary copy of an expert.
    """
    layers = [
        bytes_per_token(
            [placement.primary_devices(layer_index).count(device) for device in range(placement.num_devices)],
            top_k,
            hidden_size,
            dispatch_row,
            combine_row,
            has_dedup,
            combine,
        )
        for layer_index in range(placement.num_layers)
    ]
    return TrafficBytes(
        dispatch_payload_bytes=sum(layer.dispatch_payload_bytes for layer in layers),
        combine_payload_bytes=sum(layer.combine_payload_bytes for layer in layers),
        metadata_bytes=sum(layer.metadata_bytes for layer in layers),
    )


def routed_bytes(
    expert_indices: Tensor,
    placement: Placement,
    layer_index: int,
    hidden_size: int,
    dispatch_row: RowFormat,
    combine_row: RowFormat,
    has_dedup: bool = True,
    combine: CombineMode = "rows",
) -> TrafficBytes:
    """Count the bytes of all tokens of an actual routing in one layer, exactly, if all visit primary copies.

    Args:
        expert_indices: ``[num_tokens, top_k]`` integers, distinct within a row.
        placement: where the experts are.
        layer_index: MoE layer of the routing.
        hidden_size: H, values in a row.
        dispatch_row: format of rows on the way to experts.
        combine_row: format of rows on the way home.
        has_dedup: send a row once to each device instead of once to each expert.
        combine: what comes home; ``"partial_sums"`` needs ``has_dedup``.
    Returns:
        Integers; divide by ``num_tokens`` to compare with :func:`bytes_per_token`.
    Raises:
        ShapeError: ``expert_indices`` is no integer matrix, or names an expert that does not exist.
        ConfigError: an unknown format, or partial sums without deduplication.
    """
    num_experts = placement.num_experts
    if expert_indices.dim() != 2 or expert_indices.is_floating_point():
        raise ShapeError(
            f"routed_bytes: expert_indices are {list(expert_indices.shape)} of {expert_indices.dtype}. "
            f"Give [num_tokens, top_k] integers."
        )
    if bool(((expert_indices < 0) | (expert_indices >= num_experts)).any()):
        raise ShapeError(f"routed_bytes: expert_indices leave the range 0 to {num_experts - 1} of layer {layer_index}.")
    device_of_expert = torch.tensor(placement.primary_devices(layer_index))
    devices = device_of_expert[expert_indices.cpu().long()]  # [T, K]
    is_visited = torch.zeros(len(devices), placement.num_devices, dtype=torch.bool).scatter_(1, devices, True)
    return _traffic(
        num_pairs=int((devices != 0).sum()),
        num_visits=int(is_visited[:, 1:].sum()),
        dispatch_row_bytes=row_bytes(hidden_size, dispatch_row),
        combine_row_bytes=row_bytes(hidden_size, combine_row),
        has_dedup=has_dedup,
        combine=combine,
    )


def _traffic(
    num_pairs: float,
    num_visits: float,
    dispatch_row_bytes: int,
    combine_row_bytes: int,
    has_dedup: bool,
    combine: CombineMode,
) -> TrafficBytes:
    if combine not in ("rows", "partial_sums"):
        raise ConfigError(f"combine is {combine!r}; allowed are rows and partial_sums.")
    if combine == "partial_sums" and not has_dedup:
        raise ConfigError(
            "combine is 'partial_sums' without deduplication: a host cannot tell which rows belong to one token. "
            "Set has_dedup, or use combine='rows'."
        )
    metadata_per_pair = EXPERT_METADATA_BYTES + (_WEIGHT_BYTES if combine == "partial_sums" else 0)
    return TrafficBytes(
        dispatch_payload_bytes=(num_visits if has_dedup else num_pairs) * dispatch_row_bytes,
        combine_payload_bytes=(num_pairs if combine == "rows" else num_visits) * combine_row_bytes,
        metadata_bytes=num_pairs * metadata_per_pair,
    )
