import functools
import threading

import pytest
import torch
from factories import ListCache, random_token_ids
from host_factories import (
    EXACT,
    EXACT_DISPATCH,
    EXACT_RECIPES,
    FLOAT_KINDS,
    KINDS,
    LocalLinks,
    distribute,
    experts_of,
    model_of,
    place,
    random_choices,
    start_local_hosts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatch_batch import RowRules
from cluster.expert_host import ExpertHost
from cluster.placement.cost import routed_bytes
from cluster.remote_experts import Dispatcher, DispatchPlan, RemoteExperts
from cluster.transport.codec import decode, encode
from cluster.transport.frames import HEADER_BYTES, CombineFrame
from cluster.transport.header import FrameLimits
from cluster.transport.meter import TrafficMeter
from cluster.transport.row_format import Combine
from moe_bitnet.errors import ClusterError, HostDownError, StalePlanError
from moe_bitnet.generation import generate
from moe_bitnet.router import Routing

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 2, 5, 2, 12

copies = st.integers(1, 4).flatmap(
    lambda num_devices: st.tuples(
        st.lists(
            st.lists(
                st.lists(st.integers(0, num_devices - 1), min_size=1, max_size=num_devices, unique=True),
                min_size=NUM_EXPERTS,
                max_size=NUM_EXPERTS,
            ),
            min_size=NUM_LAYERS,
            max_size=NUM_LAYERS,
        ),
        st.just(num_devices),
    )
)
SPREAD = ([[0, 1, 2, 1, 0], [2, 2, 1, 0, 1]], 3)
# device 1 holds nothing of layer 0, the home nothing of layer 1, device 3 nothing at all
GAPS = ([[0, 2, 2, 0, 2], [1, 2, 1, 1, 2]], 4)
REPLICATED = ([[[0], [1, 2], [2, 1], [1, 2], [0]], [[2, 1], [2, 1], [1, 2], [0, 1], [1, 2]]], 3)
ALL_AT_HOME = ([[0] * NUM_EXPERTS] * NUM_LAYERS, 2)
PLANS = [SPREAD, GAPS, REPLICATED, ALL_AT_HOME]


@functools.cache
def shared_model(kind, recipe="squared_relu, odd"):
    return model_of(kind, recipe=recipe)


def spread_out(model, plan, rules=None, **settings):
    return distribute(model, place(*plan)[1], rules, **settings)


@torch.inference_mode()
def logits_of(model, token_ids):
    return model(token_ids).logits


def random_routing(num_tokens, seed=0):
    choices = random_choices(num_tokens, NUM_EXPERTS, TOP_K, seed)
    weights = torch.rand(num_tokens, TOP_K, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    return Routing(choices, weights, torch.zeros(num_tokens, NUM_EXPERTS))


def random_rows(num_tokens, seed=3):
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def assert_same(kind, placement, logits, expected):
    """The same bits; for replicated float experts the same values: BLAS sums by how many rows an expert gets."""
    if kind in FLOAT_KINDS and placement.has_replicas:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits, expected)


# --- The same answer as one process gives


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    copies,
    st.sampled_from(KINDS),
    st.sampled_from(list(EXACT_RECIPES)),
    st.sampled_from([1, 7, 33]),
    st.booleans(),
)
def test_exact_logits_are_the_local_ones_bit_for_bit_wherever_the_experts_are(
    plan, kind, recipe, num_tokens, has_dedup
):
    model, token_ids = shared_model(kind, recipe), random_token_ids(1, num_tokens)
    remote, dispatcher, *_ = spread_out(model, plan, RowRules(EXACT_DISPATCH[kind], EXACT, has_dedup))
    assert_same(kind, dispatcher.plan.placement, logits_of(remote, token_ids), logits_of(model, token_ids))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_keep_every_bit_of_every_kind(kind, plan):
    model, token_ids = shared_model(kind), random_token_ids(3, 11)
    remote, dispatcher, *_ = spread_out(model, plan, RowRules("float32", EXACT))
    assert_same(kind, dispatcher.plan.placement, logits_of(remote, token_ids), logits_of(model, token_ids))


@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_partial_sums_agree_to_a_millionth_of_each_rows_norm(kind, plan, num_tokens):
    model, routing, rows = shared_model(kind), random_routing(num_tokens), random_rows(num_tokens)
    rules = RowRules(EXACT_DISPATCH[kind], Combine("partial_sums", "float32"))
    _, dispatcher, *_ = spread_out(model, plan, rules)
    with torch.inference_mode():
        expected = experts_of(model).run(rows, routing)
    error = (dispatcher.run(0, rows, routing) - expected).norm(dim=1)
    assert (error <= 1e-6 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("plan", PLANS)
def test_experts_see_the_same_integers_whatever_comes_back(plan):
    sent = []
    for combine in (EXACT, Combine(), Combine("partial_sums", "int8")):
        _, dispatcher, links, _ = spread_out(shared_model("2bit"), plan, RowRules("int8", combine))
        dispatcher.run(0, random_rows(7), random_routing(7))
        frames = [(name, decode(frame, FrameLimits()).frame) for name, frame in links.frames]
        sent.append(
            [(name, each.rows.tolist(), each.scales.tolist(), each.expert_ids.tolist()) for name, each in frames]
        )
    assert sent[0] == sent[1] == sent[2]


@pytest.mark.parametrize(("row_format", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-10), ("int8", 2**-6)])
@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
def test_rounded_answers_are_off_by_their_rounding_alone(row_format, tolerance, mode):
    """A value is off by half a unit of its format, int8 by half a 127th of its row's largest: well below twice that."""
    model, routing, rows = shared_model("2bit"), random_routing(33), random_rows(33)
    results = []
    for combine in (Combine(mode, "float32"), Combine(mode, row_format)):
        _, dispatcher, *_ = spread_out(model, SPREAD, RowRules("int8", combine))
        results.append(dispatcher.run(0, rows, routing))
    # the largest row that is rounded: a sum, or one expert's output before it is weighed
    largest = max(results[0].abs().max(), *(row.abs().max() for row in experts_rows(model, rows, routing)))
    assert 0 < (results[1] - results[0]).abs().max() <= tolerance * largest


def experts_rows(model, rows, routing):
    for choice in range(TOP_K):
        weights = torch.zeros_like(routing.expert_weights)
        weights[:, choice] = 1
        with torch.inference_mode():
            yield experts_of(model).run(rows, Routing(routing.expert_indices, weights, routing.router_logits))


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_local_one(kind, has_cache):
    model = shared_model(kind)
    remote, *_ = spread_out(model, REPLICATED, RowRules(EXACT_DISPATCH[kind], EXACT))
    first, second = (
        generate(each, [5, 17, 2], max_new_tokens=9, cache=ListCache(NUM_LAYERS) if has_cache else None)
        for each in (model, remote)
    )
    assert len(first) == 9
    assert second == first


def test_shared_experts_stay_at_home():
    model = model_of("2bit", num_shared_experts=2)
    token_ids = random_token_ids(1, 7)
    remote, *_ = spread_out(model, SPREAD)
    assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))


def test_all_frames_leave_before_the_first_answer_is_awaited():
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD)
    dispatcher.run(0, random_rows(33), random_routing(33))
    assert links.log == ["send"] * 2 + ["receive"] * 2


# --- What crosses


@settings(max_examples=25, deadline=None, derandomize=True)
@given(copies, st.sampled_from([1, 7, 33]), st.integers(0, 99))
def test_a_row_is_sent_once_to_each_device_and_every_expert_is_asked_once(plan, num_tokens, seed):
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), plan)
    routing = random_routing(num_tokens, seed)
    dispatcher.run(0, random_rows(num_tokens), routing)
    placement = dispatcher.plan.placement
    asked = []
    assert len(links.frames) == len({name for name, _ in links.frames}), "one frame a device"
    for name, buffer in links.frames:
        frame = decode(buffer, FrameLimits()).frame
        held = placement.expert_ids_on(placement.device_names.index(name), 0)
        assert set(frame.expert_ids.tolist()) <= set(held)
        assert len(frame.rows) <= num_tokens
        asked += frame.expert_ids.tolist()
    at_home = set(placement.expert_ids_on(0, 0))
    expected = [each for each in routing.expert_indices.flatten().tolist() if each not in at_home]
    assert sorted(asked) == sorted(expected), "what the home holds is never asked for elsewhere"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([SPREAD, GAPS, ALL_AT_HOME]),
    st.sampled_from([1, 7, 33]),
    st.sampled_from(["int8", "float16", "float32"]),
    st.sampled_from(["rows", "partial_sums"]),
    st.sampled_from(["int8", "bfloat16", "float32"]),
    st.booleans(),
)
def test_the_meter_counts_what_the_cost_model_counts(plan, num_tokens, dispatch, mode, row_format, has_dedup):
    combine, token_ids = Combine(mode, row_format), random_token_ids(1, num_tokens)
    remote, dispatcher, links, meter = spread_out(shared_model("2bit"), plan, RowRules(dispatch, combine, has_dedup))
    choices = []
    for block in remote.blocks:
        block.moe.router.register_forward_hook(lambda _, __, routing: choices.append(routing.expert_indices))
    logits_of(remote, token_ids)
    placement = dispatcher.plan.placement
    expected = [
        routed_bytes(indices, placement, layer_index, HIDDEN_SIZE, dispatch, combine, has_dedup)
        for layer_index, indices in enumerate(choices)
    ]
    assert len(expected) == NUM_LAYERS
    assert meter.inter_device_bytes(["payload", "metadata"]) == sum(traffic.total_bytes for traffic in expected)
    assert meter.inter_device_bytes(["metadata"]) == sum(traffic.metadata_bytes for traffic in expected)
    assert meter.inter_device_bytes(["header"]) >= HEADER_BYTES * 2 * len(links.frames)  # each frame has an answer
    sent = sum(size for key, size in meter.totals().items() if key.direction == "dispatch" and key.kind != "framing")
    assert sent == sum(len(frame) for _, frame in links.frames)
    assert meter.num_tokens == num_tokens


def test_links_are_named_after_devices():
    remote, _, _, meter = spread_out(shared_model("2bit"), GAPS)
    logits_of(remote, random_token_ids(1, 33))
    links = {(key.layer_index, key.direction, key.source, key.destination) for key in meter.totals()}
    assert links == {
        (layer_index, direction, *(ends if direction == "dispatch" else reversed(ends)))
        for layer_index, devices in enumerate([(2,), (1, 2)])
        for ends in (("device-0", f"device-{device}") for device in devices)
        for direction in ("dispatch", "combine")
    }


def test_nothing_crosses_when_the_home_holds_all():
    remote, _, links, meter = spread_out(shared_model("2bit"), ALL_AT_HOME)
    logits_of(remote, random_token_ids(1, 33))
    assert meter.inter_device_bytes() == 0
    assert meter.bytes_per_token() == 0
    assert not links.frames


def test_tokens_are_counted_once_and_not_in_every_layer():
    remote, _, _, meter = spread_out(shared_model("2bit"), SPREAD)
    logits_of(remote, random_token_ids(3, 7))
    assert meter.num_tokens == 21
    generate(remote, [1, 2, 3], max_new_tokens=4, cache=ListCache(NUM_LAYERS))
    assert meter.num_tokens == 21 + 3 + 3  # the last new token is never computed


# --- Hosts that fail


def dies(answer):
    raise HostDownError("host is down")


@pytest.mark.parametrize("victim", ["device-1", "device-2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_dies_at_work_is_replaced_by_the_other_copies_bit_for_bit(kind, victim):
    model, token_ids = shared_model(kind), random_token_ids(1, 33)
    remote, dispatcher, links, _ = spread_out(model, REPLICATED, RowRules(EXACT_DISPATCH[kind], EXACT))
    links.failures[victim] = dies
    assert_same(kind, dispatcher.plan.placement, logits_of(remote, token_ids), logits_of(model, token_ids))
    assert victim in links.down
    asked = len([name for name, _ in links.frames if name == victim])
    assert asked == 1, "a host that is down is not asked again"


def test_partial_sums_survive_a_host_too():
    model, routing, rows = shared_model("2bit"), random_routing(33), random_rows(33)
    _, dispatcher, links, _ = spread_out(model, REPLICATED, RowRules())
    links.failures["device-1"] = dies
    with torch.inference_mode():
        expected = experts_of(model).run(rows, routing)
    error = (dispatcher.run(0, rows, routing) - expected).norm(dim=1)
    assert (error <= 1e-6 * expected.norm(dim=1)).all()


def test_without_a_copy_the_error_names_expert_and_hosts():
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD)
    links.failures["device-1"] = dies
    with pytest.raises(HostDownError, match=r"expert [13] of layer 0 is out of reach: device-1 did not answer"):
        dispatcher.run(0, random_rows(33), random_routing(33))


def test_recovery_brings_a_new_plan_and_the_rest_is_asked_again():
    model, token_ids = shared_model("2bit"), random_token_ids(1, 33)
    asked = []

    def recover(dispatcher, down):
        asked.append(down)
        _, placement = place([[0, 0, 1, 0, 0], [1, 1, 0, 0, 0]], 2)
        new_links, home = start_local_hosts(model, placement, epoch=1)
        links.hosts = new_links.hosts
        links.down.clear()
        for layer_index in range(NUM_LAYERS):
            held = dispatcher._home.expert_ids(layer_index)
            missing = [each for each in home.expert_ids(layer_index) if each not in held]
            dispatcher._home.load(home.slice(layer_index, missing))
        dispatcher.follow(DispatchPlan.of(placement, 1), [])

    remote, dispatcher, links, _ = spread_out(model, SPREAD, recover=recover)
    links.failures["device-2"] = dies
    assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))
    assert asked == [["device-2"]]
    assert dispatcher.plan.epoch == 1


def test_a_stale_plan_is_asked_again_by_the_new_one():
    model, token_ids = shared_model("2bit"), random_token_ids(1, 33)

    def recover(dispatcher, down):
        assert down == []
        dispatcher.follow(DispatchPlan.of(dispatcher.plan.placement, 7), [])

    remote, dispatcher, links, _ = spread_out(model, SPREAD, recover=recover)
    for host in links.hosts.values():
        host.follow(7)
        host.leave_before(7)
    assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))
    assert dispatcher.plan.epoch == 7


def test_a_stale_plan_without_recovery_is_an_error():
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD)
    links.hosts["device-1"].follow(3)
    links.hosts["device-1"].leave_before(3)
    with pytest.raises(StalePlanError, match="follows plan 3, the frame follows plan 0"):
        dispatcher.run(0, random_rows(33), random_routing(33))


def test_recovery_that_does_not_help_ends_in_an_error():
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD, recover=lambda *_: links.down.clear())
    links.failures["device-1"] = dies
    with pytest.raises(HostDownError, match="did not answer in 16 attempts"):
        dispatcher.run(0, random_rows(33), random_routing(33))


def test_a_plan_changes_between_two_layers_while_others_run():
    """Two threads run the model while a third puts plans in force, forth and back; every result is the local one."""
    model, token_ids = shared_model("2bit"), random_token_ids(1, 7)
    everywhere = ([[[0, 1, 2]] * NUM_EXPERTS] * NUM_LAYERS, 3)
    remote, dispatcher, links, _ = spread_out(model, everywhere)
    for host in links.hosts.values():
        for epoch in range(1, 40):
            host.follow(epoch)
    expected, results = logits_of(model, token_ids), []

    def work():
        results.extend(torch.equal(logits_of(remote, token_ids), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for epoch in range(1, 40):
        _, placement = place(*(PLANS[epoch % 3] if epoch % 2 else everywhere))
        if placement.num_devices == 3:
            dispatcher.follow(DispatchPlan.of(placement, epoch), [])
    for thread in threads:
        thread.join()
    assert results == [True] * 40


# --- Answers that are wrong


def changed(**changes):
    """Give a combine frame other fields."""

    def falsify(buffer):
        frame = decode(buffer, FrameLimits()).frame
        fields = {"layer_index": frame.layer_index, "epoch": frame.epoch, "rows": frame.rows}
        return encode(CombineFrame(**{**fields, **{name: change(fields[name]) for name, change in changes.items()}}))

    return falsify


@pytest.mark.parametrize(
    "falsify",
    [
        changed(rows=lambda rows: rows[1:]),
        changed(rows=lambda rows: torch.cat((rows, rows[:1]))),
        changed(rows=lambda rows: rows[:, 1:].contiguous()),
        changed(rows=lambda rows: rows.new_zeros(0, HIDDEN_SIZE)),
        changed(rows=lambda rows: rows.new_zeros(len(rows), HIDDEN_SIZE + 1)),
        changed(rows=lambda rows: rows.half()),
        changed(epoch=lambda epoch: epoch + 1),
        changed(layer_index=lambda layer_index: layer_index + 1),
        lambda buffer: b"",
        lambda buffer: buffer[:-1],
        lambda buffer: buffer + b"\0",
    ],
)
@pytest.mark.parametrize("combine", [EXACT, Combine()])
def test_an_answer_that_is_no_answer_is_an_error(falsify, combine):
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD, RowRules("int8", combine))
    links.failures["device-2"] = falsify
    with pytest.raises(ClusterError):
        dispatcher.run(0, random_rows(33), random_routing(33))


def test_a_wrong_answer_names_its_host():
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD)
    links.failures["device-1"] = changed(epoch=lambda epoch: 7)
    with pytest.raises(ClusterError, match=r"'device-1' answered layer, plan, rows and format \(0, 7, "):
        dispatcher.run(0, random_rows(33), random_routing(33))


def test_hosts_of_another_placement_refuse():
    model = shared_model("2bit")
    links, home = start_local_hosts(model, place(*SPREAD)[1])
    plan = DispatchPlan.of(place(*GAPS)[1])
    dispatcher = Dispatcher(plan, LocalLinks(links.hosts), home, TrafficMeter(), RowRules(combine=EXACT))
    with pytest.raises(ClusterError, match=r"does not hold expert|holds no expert"):
        RemoteExperts(0, dispatcher).run(random_rows(33), random_routing(33))


def test_a_host_may_follow_two_plans_and_leaves_the_old_one():
    _, dispatcher, links, _ = spread_out(shared_model("2bit"), SPREAD)
    host: ExpertHost = links.hosts["device-1"]
    host.follow(1)
    dispatcher.run(0, random_rows(7), random_routing(7))
    host.leave_before(1)
    with pytest.raises(StalePlanError):
        dispatcher.run(0, random_rows(7), random_routing(7))
