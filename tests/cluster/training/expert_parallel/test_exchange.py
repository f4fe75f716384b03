"""Two workers in one group: every check runs in both, so that one start serves all."""

import pytest
import torch
import torch.distributed as dist
from training_workers import run_workers

from cluster.training.expert_parallel.division import ExpertDivision
from cluster.training.expert_parallel.exchange import (
    ExpertGroup,
    RowExchange,
    start_combine,
    start_dispatch,
    wait_combine,
    wait_dispatch,
)
from cluster.training.expert_parallel.executor import ExpertParallelExperts
from cluster.training.expert_parallel.messages import RowLayout
from cluster.training.expert_parallel.sharding import gather_model, shard_experts
from cluster.training.expert_parallel.traffic import exchange_bytes, expected_rows_per_token
from cluster.training.expert_parallel.visits import visits_of
from cluster.transport.meter import TrafficMeter
from moe_bitnet.config import ModelConfig
from moe_bitnet.experts import ExpertInput, build_experts
from moe_bitnet.model import MoETransformer
from moe_bitnet.router import Routing

HIDDEN_SIZE = 24


def config_of(precision="ternary", num_experts=5, top_k=2):
    return ModelConfig(33, HIDDEN_SIZE, 40, 2, 2, 1, num_experts, top_k, precision=precision)


def group_of_all():
    return ExpertGroup(dist.group.WORLD, TrafficMeter())


def routing_of(num_tokens, num_experts, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    top_logits, indices = logits.topk(top_k, dim=-1)
    return Routing(indices, top_logits.softmax(-1), logits)


def executor_of(config, workers, exchange_dtype="float32"):
    """Return this worker's part of a layer, and the whole layer."""
    torch.manual_seed(0)
    whole = build_experts(config, config.num_experts)
    division = ExpertDivision(config.num_experts, workers.num_workers)
    start, count = division.starts[workers.rank], division.counts[workers.rank]
    local = build_experts(config, count)
    local.load_state_dict({name: value[start : start + count] for name, value in whole.state_dict().items()})
    return ExpertParallelExperts(local, division, workers, exchange_dtype, 0), whole


def check_outputs_are_those_of_one_process(workers, precision):
    for top_k, num_tokens in ((1, 33), (3, 33), (3, 1)):
        executor, whole = executor_of(config_of(precision, top_k=top_k), workers)
        hidden_states = torch.randn(num_tokens, HIDDEN_SIZE)
        routing = routing_of(num_tokens, 5, top_k, workers.rank)
        output, expected = executor.run(hidden_states, routing), whole.run(hidden_states, routing)
        if top_k == 1 and precision in ("ternary", "binary"):
            assert torch.equal(output, expected), f"{precision}: an expert's output changed on its way"
        # sums are grouped by worker; K additions, each rounded once
        tolerance = 2 * top_k * 2**-23 * float(expected.abs().max())
        torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


def check_gradients_against_float64(workers):
    """Experts ``tanh(row · A_e)``, weighted: their gradients through both exchanges, and those of one process."""
    num_experts, top_k, num_tokens = 5, 3, 17
    generator = torch.Generator().manual_seed(5)
    matrices = torch.randn(num_experts, HIDDEN_SIZE, HIDDEN_SIZE, generator=generator) / 5
    rows, upstream = torch.randn(2, 2, num_tokens, HIDDEN_SIZE, generator=generator)
    weights = torch.randn(2, num_tokens, top_k, generator=generator)
    routings = [routing_of(num_tokens, num_experts, top_k, 10 + rank).expert_indices for rank in range(2)]

    truth = [tensor.double().requires_grad_() for tensor in (matrices, rows, weights)]
    for rank in range(2):
        outputs = torch.einsum("th,tkhi->tki", truth[1][rank], truth[0][routings[rank]]).tanh()
        ((truth[2][rank].unsqueeze(2) * outputs).sum(1) * upstream[rank].double()).sum().backward()

    rank = workers.rank
    division = ExpertDivision(num_experts, 2)
    start, end = division.starts[rank], division.starts[rank + 1]
    mine = [tensor.clone().requires_grad_() for tensor in (matrices[start:end], rows[rank], weights[rank])]

    def owned(rows, weights, local_ids):
        outputs = torch.einsum("th,tkhi->tki", rows, mine[0][local_ids.clamp_min(0)]).tanh()
        return (outputs * (weights * (local_ids >= 0)).unsqueeze(2)).sum(1)

    visits = visits_of(routings[rank], division, rank)
    exchange = RowExchange(workers, RowLayout(HIDDEN_SIZE, top_k, torch.float32, torch.float32), visits, 0)
    received, received_weights, ids = wait_dispatch(
        exchange, start_dispatch(exchange, ExpertInput(mine[1], None), mine[2])
    )
    returned = wait_combine(exchange, start_combine(exchange, owned(received.rows, received_weights, ids)))
    own = owned(mine[1][visits.own_tokens], mine[2][visits.own_tokens], visits.own_ids)
    output = torch.zeros_like(mine[1]).index_add(0, visits.own_tokens, own).index_add(0, visits.tokens, returned)
    (output * upstream[rank]).sum().backward()
    for name, found, expected in (
        ("experts", mine[0].grad, truth[0].grad[start:end]),
        ("rows", mine[1].grad, truth[1].grad[rank]),
        ("weights", mine[2].grad, truth[2].grad[rank]),
    ):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_layer_gradients(workers, precision):
    """Gradients of a layer's inputs, weights and parameters are those of one process that sees both workers' tokens."""
    executor, whole = executor_of(config_of(precision, top_k=3), workers)
    num_tokens = 19
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, num_tokens, HIDDEN_SIZE, generator=generator)
    upstream = torch.randn(2, num_tokens, HIDDEN_SIZE, generator=generator)
    for rank in range(2):
        hidden_states = tokens[rank].clone().requires_grad_()
        routing = routing_of(num_tokens, 5, 3, rank)
        weights = routing.expert_weights.clone().requires_grad_()
        routing = Routing(routing.expert_indices, weights, routing.router_logits)
        (whole.run(hidden_states, routing) * upstream[rank]).sum().backward()
        if rank == workers.rank:
            expected = hidden_states.grad, weights.grad
    hidden_states = tokens[workers.rank].clone().requires_grad_()
    routing = routing_of(num_tokens, 5, 3, workers.rank)
    weights = routing.expert_weights.clone().requires_grad_()
    output = executor.run(hidden_states, Routing(routing.expert_indices, weights, routing.router_logits))
    (output * upstream[workers.rank]).sum().backward()
    start, end = executor.first_expert, executor.first_expert + executor.division.counts[workers.rank]
    pairs = [(hidden_states.grad, expected[0]), (weights.grad, expected[1])]
    pairs += [(value.grad, whole.get_parameter(name).grad[start:end]) for name, value in executor.named_parameters()]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def check_idle_experts_have_gradients(workers):
    executor, _ = executor_of(config_of(), workers)
    hidden_states = torch.randn(7, HIDDEN_SIZE, requires_grad=True)
    indices = torch.tensor([[0, 1]]).expand(7, 2)  # worker 1 has experts 2, 3 and 4: it computes nothing
    weights = torch.full((7, 2), 0.5, requires_grad=True)
    executor.run(hidden_states, Routing(indices, weights, weights)).square().sum().backward()
    for name, parameter in executor.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (workers.rank == 0), name
    assert hidden_states.grad.any()


def check_meter_equals_formula(workers):
    num_tokens, num_experts, top_k = 2048, 8, 2
    for precision, exchange_dtype in (("ternary", "bfloat16"), ("float", "float32")):
        workers.meter.reset()
        executor, _ = executor_of(config_of(precision, num_experts), workers, exchange_dtype)
        hidden_states = torch.randn(num_tokens, HIDDEN_SIZE, requires_grad=True)
        routing = routing_of(num_tokens, num_experts, top_k, workers.rank)
        executor.run(hidden_states, routing).sum().backward()
        row_dtype = torch.int8 if precision == "ternary" else torch.float32
        layout = RowLayout(HIDDEN_SIZE, top_k, row_dtype, getattr(torch, exchange_dtype))
        owners = torch.tensor(executor.division.owners)[routing.expert_indices]
        counted = torch.tensor(
            [
                int((owners != workers.rank).any(dim=1).sum()),
                workers.meter.inter_device_bytes(),
                workers.meter.inter_device_bytes(("payload",)),
            ]
        )
        dist.all_reduce(counted)
        num_rows, found, payload = counted.tolist()
        assert found == exchange_bytes(layout, num_rows, 2)
        row_payload = layout.dispatch_sizes["payload"] + 3 * layout.combine_sizes["payload"]
        assert payload == num_rows * row_payload
        expected = exchange_bytes(layout, 2 * num_tokens * expected_rows_per_token(executor.division, top_k), 2)
        assert found == pytest.approx(expected, rel=0.02)


def check_a_sharded_model_comes_back_whole(workers, top_k):
    torch.manual_seed(3)
    model = MoETransformer(config_of(top_k=top_k))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    token_ids = torch.arange(12).view(2, 6) + workers.rank
    expected = model(token_ids).logits
    shard_experts(model, workers, "float32")
    assert set(model.state_dict()) == set(before)
    logits = model(token_ids).logits
    if top_k == 1:  # nothing is added in another order: int8 rows change nothing in a ternary model
        assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    whole = gather_model(model, workers)
    assert (whole is None) == (workers.rank != 0)
    if whole is not None:
        for name, value in whole.state_dict().items():
            assert torch.equal(value, before[name]), name


def work(rank, world_size, folder):
    workers = group_of_all()
    for precision in ("ternary", "binary", "float", "int4-experts"):
        check_outputs_are_those_of_one_process(workers, precision)
        check_layer_gradients(workers, precision)
    check_gradients_against_float64(workers)
    check_idle_experts_have_gradients(workers)
    check_meter_equals_formula(workers)
    for top_k in (1, 2):
        check_a_sharded_model_comes_back_whole(workers, top_k)
    return rank


def test_two_workers_share_experts(tmp_path):
    assert run_workers(work, 2, tmp_path) == [0, 1]
