r"""Bytes that experts on other devices cost, predicted from a placement or counted from a routing.

Tokens live on the home device 0; what its own experts do costs nothing. For one token and one layer
with E experts, of which e_d on device d, and top-k routing:

    pairs   (token, expert) with the expert away from home     k · (E - e_0) / E
    visits  (token, device) with the device away from home     sum over d > 0 of 1 - C(E - e_d, k) / C(E, k)

if every set of k experts is equally likely. A routing gives both by counting. Then

    dispatch payload   visits · row with deduplication (a row travels once to a device), else pairs · row
    combine payload    pairs · row for "rows" (home sums, bit for bit as on one device),
                       visits · row for "partial_sums" with deduplication (a host weighs and sums its experts' outputs)
    metadata           1 for each row sent, how many experts work on it; 2 for each pair, the expert's uint16 id;
                       for partial sums 4 more, its float32 weight

A row is 4H, 2H or, for int8 with its float32 scale, H + 4 bytes. These are the payload and metadata of
:mod:`cluster.transport.frames`. Not counted: one frame header (``HEADER_BYTES``) for each frame, at most two
frames for each device, layer and step; the transport's framing; and TCP/IP headers. Training sends everything twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from torch import Tensor

from cluster.placement.placement import Placement
from cluster.placement.replica_choice import HOME
from cluster.placement.traffic import route, visits_of_devices
from cluster.transport.row_format import (
    ROW_METADATA_BYTES,
    Combine,
    RowFormat,
    pair_metadata_bytes,
    row_bytes,
)
from moe_bitnet.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class TrafficBytes:
    """Bytes between devices, without frame headers; exact integers where they were counted.

    Attributes:
        dispatch_payload_bytes: rows and scales from home to experts.
        combine_payload_bytes: expert outputs from experts to home.
        metadata_bytes: expert ids, experts a row and, for partial sums, expert weights.
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
    combine: Combine,
    has_dedup: bool = True,
) -> TrafficBytes:
    """Predict the bytes of one token in one layer under uniform routing.

    Args:
        num_experts_per_device: experts of the layer on each device, home first.
        top_k: K, experts that a token visits.
        hidden_size: H, values in a row.
        dispatch_row: format of rows on the way to experts.
        combine: what comes home, and in which format.
        has_dedup: send a row once to each device instead of once to each expert.
    Raises:
        ConfigError: impossible ``top_k``, or an unknown format.
    """
    return traffic_bytes(
        num_pairs=copies_per_token(num_experts_per_device, top_k, has_dedup=False),
        num_visits=copies_per_token(num_experts_per_device, top_k, has_dedup=True),
        hidden_size=hidden_size,
        dispatch_row=dispatch_row,
        combine=combine,
        has_dedup=has_dedup,
    )


def expected_bytes_per_token(
    placement: Placement,
    top_k: int,
    hidden_size: int,
    dispatch_row: RowFormat,
    combine: Combine,
    has_dedup: bool = True,
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
            combine,
            has_dedup,
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
    combine: Combine,
    has_dedup: bool = True,
) -> TrafficBytes:
    """Count the bytes of all tokens of an actual routing in one layer, exactly.

    Of several copies each token visits the one that a replay chooses (:func:`cluster.placement.traffic.route`).

    Args:
        expert_indices: ``[num_tokens, top_k]`` integers, distinct within a row.
        placement: where the experts are.
        layer_index: MoE layer of the routing.
        hidden_size: H, values in a row.
        dispatch_row: format of rows on the way to experts.
        combine: what comes home, and in which format.
        has_dedup: send a row once to each device instead of once to each expert.
    Returns:
        Integers; divide by ``num_tokens`` to compare with :func:`bytes_per_token`.
    Raises:
        ShapeError: ``expert_indices`` is no integer matrix, or names an expert that does not exist.
        ConfigError: an unknown format.
    """
    num_experts = placement.num_experts
    if expert_indices.dim() != 2 or expert_indices.is_floating_point():
        raise ShapeError(
            f"routed_bytes: expert_indices are {list(expert_indices.shape)} of {expert_indices.dtype}. "
            f"Give [num_tokens, top_k] integers."
        )
    if bool(((expert_indices < 0) | (expert_indices >= num_experts)).any()):
        raise ShapeError(f"routed_bytes: expert_indices leave the range 0 to {num_experts - 1} of layer {layer_index}.")
    copies, num_devices = placement.devices_of_expert[layer_index], placement.num_devices
    devices = route(copies, expert_indices.cpu().long().numpy(), num_devices)  # [T, K]
    return traffic_bytes(
        num_pairs=int((devices != HOME).sum()),
        num_visits=int(visits_of_devices(devices, num_devices)[1:].sum()),
        hidden_size=hidden_size,
        dispatch_row=dispatch_row,
        combine=combine,
        has_dedup=has_dedup,
    )


def traffic_bytes(
    num_pairs: float,
    num_visits: float,
    hidden_size: int,
    dispatch_row: RowFormat,
    combine: Combine,
    has_dedup: bool = True,
) -> TrafficBytes:
    """Return the bytes of pairs and visits away from home: the formula at the top of this module.

    Args:
        num_pairs: (token, expert) pairs with the expert away from home.
        num_visits: (token, device) visits away from home.
        hidden_size: H, values in a row.
        dispatch_row: format of rows on the way to experts.
        combine: what comes home, and in which format.
        has_dedup: send a row once to each device instead of once to each expert.
    Raises:
        ConfigError: an unknown format.
    """
    num_rows = num_visits if has_dedup else num_pairs
    num_answers = num_pairs if combine.mode == "rows" else num_rows
    return TrafficBytes(
        dispatch_payload_bytes=num_rows * row_bytes(hidden_size, dispatch_row),
        combine_payload_bytes=num_answers * row_bytes(hidden_size, combine.row_format),
        metadata_bytes=num_rows * ROW_METADATA_BYTES + num_pairs * pair_metadata_bytes(combine.mode),
    )
