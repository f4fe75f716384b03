"""What expert parallelism sends, as formulas: the same rows as :mod:`cluster.placement.cost`, with gradients.

For one layer, forward and backward, a row that goes to another worker costs

    dispatch            H + 4 bytes as int8, or H floats, and 5K for weights and ids   once, twice with checkpointing
    combine             H floats of the exchange dtype                                 the same
    combine gradient    H floats                                                       once
    dispatch gradient   H floats, and 4K for the gradients of weights                  once

and there are ``copies_per_token`` rows a token under uniform routing, whoever is its home. Besides 8 bytes for each
pair of workers announce how many rows follow.
"""

from cluster.placement.cost import copies_per_token
from cluster.training.expert_parallel.division import ExpertDivision
from cluster.training.expert_parallel.messages import RowLayout

COUNT_BYTES = 8
"""How many rows follow: one int64 for each other worker."""


def exchange_bytes(
    layout: RowLayout, num_rows: float, num_announcements: int, has_activation_checkpointing: bool = False
) -> float:
    """Return the bytes that one layer's batch costs in a training step.

    Args:
        layout: of the messages.
        num_rows: that go to another worker, summed over all homes.
        num_announcements: pairs of workers that send each other rows, in each direction one; summed over groups.
        has_activation_checkpointing: the forward exchanges run again in the backward pass.
    """
    num_forwards = 2 if has_activation_checkpointing else 1
    forward = sum(layout.dispatch_sizes.values()) + sum(layout.combine_sizes.values())
    backward = sum(layout.combine_sizes.values()) + sum(layout.gradient_sizes.values())
    return num_rows * (num_forwards * forward + backward) + num_forwards * num_announcements * COUNT_BYTES


def expected_rows_per_token(division: ExpertDivision, top_k: int) -> float:
    """Return the rows that a token sends to other workers in one layer under uniform routing, mean over homes.

    Args:
        division: of the layer's experts.
        top_k: K, experts that a token visits.
    """
    homes = range(division.num_workers)
    counts = list(division.counts)
    return sum(copies_per_token([counts[home], *counts[:home], *counts[home + 1 :]], top_k, True) for home in homes) / (
        division.num_workers
    )
