"""Two exchanges of rows between workers, each with gradients, each in two halves: start and wait.

::

    forward      start_dispatch ─── message on its way ───► wait_dispatch
    backward     (waits) ◄── gradients on their way ─── (starts)

Between the halves of an exchange a worker computes something else, in both directions. The halves are joined by a
*ticket*, an empty tensor that makes autograd run them in order; what travels is kept beside it, so that a message's
bytes need not be those of a tensor with a gradient. Every worker of a group must run the same exchanges in the same
order, also without a row to send.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cluster.training.expert_parallel.messages import RowLayout
from cluster.training.expert_parallel.traffic import COUNT_BYTES
from cluster.training.expert_parallel.visits import Visits
from cluster.transport.meter import Direction, TrafficMeter
from moe_bitnet.experts import ExpertInput


@dataclass(frozen=True, eq=False)
class ExpertGroup:
    """The workers that share one copy of the experts, and what counts their messages.

    Attributes:
        group: process group; rows go between its members.
        meter: takes what this worker sends; devices are called ``worker-<rank of all>``.
    """

    group: dist.ProcessGroup
    meter: TrafficMeter

    @property
    def rank(self) -> int:
        """Of this worker in the group."""
        return dist.get_rank(self.group)

    @property
    def num_workers(self) -> int:
        """D, workers of the group."""
        return dist.get_world_size(self.group)

    @property
    def worker_names(self) -> list[str]:
        """Names of the members for the meter."""
        return [f"worker-{rank}" for rank in dist.get_process_group_ranks(self.group)]


class RowExchange:
    """The rows of one layer's batch on their way there, back, and both ways again with gradients.

    Args:
        workers: who takes part.
        layout: of the messages.
        visits: which of this worker's rows go where.
        layer_index: for the meter.
    """

    def __init__(self, workers: ExpertGroup, layout: RowLayout, visits: Visits, layer_index: int) -> None:
        self.layout, self.visits = layout, visits
        self._workers, self._layer_index = workers, layer_index
        self._sent_counts = visits.counts
        self._received_counts = self._exchange_counts()
        self._work: dist.Work | None = None
        self._message = self._answer = torch.empty(0)

    @property
    def sent_counts(self) -> list[int]:
        """Rows that this worker sends to each of the group."""
        return self._sent_counts

    @property
    def num_received(self) -> int:
        """Rows that this worker gets of all others."""
        return sum(self._received_counts)

    def start(self, message: Tensor, direction: Direction) -> None:
        """Send a message of one line a row, without waiting.

        Args:
            message: uint8 ``[n, bytes]``; rows of home in the directions home → owner, received ones back.
            direction: ``"dispatch"`` and ``"combine_gradient"`` go from home to owner.
        """
        assert self._work is None, "the exchange before was not waited for"
        is_outward = direction in ("dispatch", "combine_gradient")
        sent, received = self._sent_counts, self._received_counts
        if not is_outward:
            sent, received = received, sent
        self._message = message  # must live until it is sent
        self._answer = message.new_empty(sum(received), message.shape[1])
        self._work = dist.all_to_all_single(
            self._answer, message, received, sent, group=self._workers.group, async_op=True
        )
        self._record(direction, sent)

    def wait(self) -> Tensor:
        """Return the message that came."""
        assert self._work is not None, "no exchange was started"
        self._work.wait()
        answer, self._work = self._answer, None
        self._message = self._answer = torch.empty(0)
        return answer

    def _exchange_counts(self) -> list[int]:
        sent = torch.tensor(self._sent_counts, device=self.visits.tokens.device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._workers.group)
        names, rank = self._workers.worker_names, self._workers.rank
        for name in names:
            if name != names[rank]:
                self._workers.meter.record(names[rank], name, self._layer_index, "dispatch", {"header": COUNT_BYTES})
        counts: list[int] = received.tolist()
        return counts

    def _record(self, direction: Direction, sent: list[int]) -> None:
        layout = self.layout
        if direction == "dispatch":
            sizes = layout.dispatch_sizes
        else:
            sizes = layout.gradient_sizes if direction == "dispatch_gradient" else layout.combine_sizes
        names = self._workers.worker_names
        for name, count in zip(names, sent, strict=True):
            if count:
                self._workers.meter.record(
                    names[self._workers.rank],
                    name,
                    self._layer_index,
                    direction,
                    {kind: size * count for kind, size in sizes.items()},
                )


def start_dispatch(exchange: RowExchange, rows: ExpertInput, expert_weights: Tensor) -> Tensor:
    """Send the rows that other workers need.

    Args:
        exchange: of this layer and batch.
        rows: of all tokens, ``[T, H]``.
        expert_weights: float32 ``[T, K]``.
    Returns:
        a ticket for :func:`wait_dispatch`.
    """
    ticket: Tensor = _StartDispatch.apply(  # type: ignore[no-untyped-call]
        exchange, rows.rows, rows.activation_scale, expert_weights
    )
    return ticket


def wait_dispatch(exchange: RowExchange, ticket: Tensor) -> tuple[ExpertInput, Tensor, Tensor]:
    """Return the rows that other workers sent ``[m, H]``, their weights ``[m, K]`` and their local ids ``[m, K]``."""
    rows, scale, weights, ids = _WaitDispatch.apply(exchange, ticket)  # type: ignore[no-untyped-call]
    return ExpertInput(rows, scale), weights, ids


def start_combine(exchange: RowExchange, sums: Tensor) -> Tensor:
    """Send partial sums ``[m, H]`` of received rows home; returns a ticket for :func:`wait_combine`."""
    ticket: Tensor = _StartCombine.apply(exchange, sums)  # type: ignore[no-untyped-call]
    return ticket


def wait_combine(exchange: RowExchange, ticket: Tensor) -> Tensor:
    """Return the partial sums of the rows that were sent, float32 ``[n, H]``, in their order."""
    sums: Tensor = _WaitCombine.apply(exchange, ticket)  # type: ignore[no-untyped-call]
    return sums


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, exchange: RowExchange, rows: Tensor, scale: Tensor | None, weights: Tensor) -> Tensor:
        ctx.exchange, ctx.shapes = exchange, (rows.shape, weights.shape)  # type: ignore[attr-defined]
        tokens, ids = exchange.visits.tokens, exchange.visits.local_ids
        taken = ExpertInput(rows[tokens], None if scale is None else scale[tokens])
        exchange.start(exchange.layout.encode_dispatch(taken, weights[tokens], ids), "dispatch")
        return weights.new_empty(0)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> tuple[None, Tensor, None, Tensor]:
        exchange: RowExchange = ctx.exchange  # type: ignore[attr-defined]
        rows, weights = exchange.layout.decode_gradients(exchange.wait())
        tokens = exchange.visits.tokens
        of_rows, of_weights = (weights.new_zeros(shape) for shape in ctx.shapes)  # type: ignore[attr-defined]
        _add_by_worker(of_rows, exchange, rows)
        of_weights.index_add_(0, tokens, weights)  # a choice has its gradient of one worker, and zeros of the others
        return None, of_rows, None, of_weights


class _WaitDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, exchange: RowExchange, ticket: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        rows, weights, ids = exchange.layout.decode_dispatch(exchange.wait())
        without_gradient = [ids] if rows.activation_scale is None else [rows.activation_scale, ids]
        ctx.mark_non_differentiable(*without_gradient)
        return rows.rows, rows.activation_scale, weights, ids

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        exchange: RowExchange = ctx.exchange  # type: ignore[attr-defined]
        of_rows, _, of_weights, _ = gradients
        exchange.start(exchange.layout.encode_gradients(of_rows, of_weights), "dispatch_gradient")
        return None, of_weights.new_empty(0)


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, exchange: RowExchange, sums: Tensor) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        exchange.start(exchange.layout.encode_sums(sums), "combine")
        return sums.new_empty(0)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> tuple[None, Tensor]:
        exchange: RowExchange = ctx.exchange  # type: ignore[attr-defined]
        return None, exchange.layout.decode_sums(exchange.wait())


class _WaitCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, exchange: RowExchange, ticket: Tensor) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        return exchange.layout.decode_sums(exchange.wait())

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        exchange: RowExchange = ctx.exchange  # type: ignore[attr-defined]
        exchange.start(exchange.layout.encode_sums(gradients[0]), "combine_gradient")
        return None, gradients[0].new_empty(0)


def _add_by_worker(total: Tensor, exchange: RowExchange, rows: Tensor) -> None:
    """Add rows of sent tokens to ``total`` in place, worker by worker: within one no token comes twice."""
    counts = exchange.sent_counts
    for tokens, part in zip(torch.split(exchange.visits.tokens, counts), torch.split(rows, counts), strict=True):
        total.index_add_(0, tokens, part)
