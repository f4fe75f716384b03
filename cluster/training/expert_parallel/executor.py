"""An ``ExpertExecutor`` for training whose experts are divided among the workers of a group.

::

    hidden_states [T, H] ──quantize once──► rows of other workers' experts ──► ... ──┐
                              └──► rows of the experts here                          │
    here, in this order: start dispatch, wait; others' rows through my experts; start combine;
                         my rows through my experts, while sums come home; wait; add up in the order of workers

In the backward pass the same steps run from the last to the first, so that gradients travel while those of the own
rows are computed. A sum over experts is grouped by worker, so that it may differ from that of one process in the last
bits; each expert's output for a row is the same to the bit if rows travel as int8.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cluster.training.config import ExchangeDtype
from cluster.training.expert_parallel.division import ExpertDivision
from cluster.training.expert_parallel.exchange import (
    ExpertGroup,
    RowExchange,
    start_combine,
    start_dispatch,
    wait_combine,
    wait_dispatch,
)
from cluster.training.expert_parallel.messages import RowLayout, id_dtype_for
from cluster.training.expert_parallel.visits import Visits, visits_of
from moe_bitnet.dispatch import sort_by_expert
from moe_bitnet.experts import ExpertInput, GroupedExperts
from moe_bitnet.router import Routing

Compute = Callable[[ExpertInput, Tensor], Tensor]
"""Sorted rows ``[n, H]`` and expert offsets → outputs ``[n, H]``."""


class ExpertParallelExperts(nn.Module):
    """The experts of one layer that this worker holds, and the way to all others.

    The parameters have the names that they have without expert parallelism, and the experts held here alone.

    Args:
        experts: held here.
        division: of all experts of the layer.
        workers: of the group.
        exchange_dtype: of partial sums and gradients.
        layer_index: for the meter.
        is_compiled: compile what the experts compute, for any number of rows; the exchange around it stays as it is.
    """

    def __init__(
        self,
        experts: GroupedExperts,
        division: ExpertDivision,
        workers: ExpertGroup,
        exchange_dtype: ExchangeDtype,
        layer_index: int,
        is_compiled: bool = False,
    ) -> None:
        super().__init__()
        assert experts.num_experts == division.counts[workers.rank]
        self.division = division
        self.first_expert = division.starts[workers.rank]
        self._local = (experts,)  # not a submodule: it would put its name before the parameters'
        self._workers, self._layer_index = workers, layer_index
        self._exchange_dtype = getattr(torch, exchange_dtype)
        self._compute: Compute = torch.compile(experts.compute) if is_compiled else experts.compute
        for name, parameter in experts.named_parameters():
            self.register_parameter(name, parameter)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Fulfil :class:`moe_bitnet.experts.ExpertExecutor`; every worker of the group must call it."""
        (experts,) = self._local
        rows = experts.prepare(hidden_states)
        visits = visits_of(routing.expert_indices, self.division, self._workers.rank)
        layout = self._layout(rows, routing)
        exchange = RowExchange(self._workers, layout, visits, self._layer_index)
        ticket = start_dispatch(exchange, rows, routing.expert_weights)
        received, weights, local_ids = wait_dispatch(exchange, ticket)
        ticket = start_combine(exchange, partial_sums(experts, self._compute, received, weights, local_ids))
        own_weights = routing.expert_weights.index_select(0, visits.own_tokens)
        own_rows = rows.take(visits.own_tokens)
        own = partial_sums(experts, self._compute, own_rows, own_weights, visits.own_ids)
        returned = wait_combine(exchange, ticket)
        return self._add_up(hidden_states, visits, own, returned)

    def _layout(self, rows: ExpertInput, routing: Routing) -> RowLayout:
        row_dtype, device_type = torch.int8, rows.rows.device.type
        if rows.activation_scale is None:
            # what the experts' products would round them to
            is_rounded = torch.is_autocast_enabled(device_type)
            row_dtype = torch.get_autocast_dtype(device_type) if is_rounded else torch.float32
        return RowLayout(
            rows.rows.shape[1],
            routing.expert_indices.shape[1],
            row_dtype,
            self._exchange_dtype,
            id_dtype_for(max(self.division.counts)),
        )

    def _add_up(self, hidden_states: Tensor, visits: Visits, own: Tensor, returned: Tensor) -> Tensor:
        """Add partial sums in the order of workers; float32 ``[T, H]``."""
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        tokens, sums = (list(torch.split(rows, visits.counts)) for rows in (visits.tokens, returned))
        tokens[self._workers.rank], sums[self._workers.rank] = visits.own_tokens, own
        for tokens_of_worker, sums_of_worker in zip(tokens, sums, strict=True):
            total = total.index_add(0, tokens_of_worker, sums_of_worker)
        return total


def partial_sums(
    experts: GroupedExperts, compute: Compute, rows: ExpertInput, weights: Tensor, local_ids: Tensor
) -> Tensor:
    """Return each row's weighted sum over the experts held here.

    Args:
        experts: held here.
        compute: their :meth:`~moe_bitnet.experts.GroupedExperts.compute`, perhaps compiled.
        rows: ``[n, H]``, each with at least one expert here.
        weights: float32 ``[n, K]``.
        local_ids: int64 ``[n, K]``; below 0 for choices that are elsewhere.
    Returns:
        float32 ``[n, H]``, added in the order of the choices. Without a row the parameters still get gradients,
        zeros: workers must agree on which there are.
    """
    num_rows, top_k = local_ids.shape
    if num_rows == 0:
        parameters = torch.stack([parameter.flatten()[0] for parameter in experts.parameters()])
        return (rows.rows.float() + 0 * weights.sum()) + 0 * parameters.sum()
    slots = (local_ids.flatten() >= 0).nonzero().squeeze(1)
    row_of_slot = slots // top_k
    row_alignment = experts.training_row_alignment if torch.is_grad_enabled() else 1
    dispatch = sort_by_expert(local_ids.flatten()[slots].unsqueeze(1), experts.num_experts, row_alignment)
    sorted_rows = rows.take(row_of_slot[dispatch.sorted_token_indices])
    for tensor in (sorted_rows.rows, sorted_rows.activation_scale):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or each new number of rows would be compiled
    outputs = compute(sorted_rows, dispatch.expert_offsets)
    weighted = outputs.index_select(0, dispatch.slot_positions) * weights.flatten().index_select(0, slots).unsqueeze(1)
    return torch.zeros_like(rows.rows, dtype=torch.float32).index_add(0, row_of_slot, weighted)
