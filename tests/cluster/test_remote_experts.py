import copy
import functools
import os

import pytest
import torch
from factories import ListCache, random_token_ids
from host_factories import (
    EXACT_DISPATCH,
    EXACT_RECIPES,
    KINDS,
    LocalClient,
    experts_of,
    model_of,
    place,
    random_choices,
    start_local_hosts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.cost import routed_bytes
from cluster.remote_experts import RemoteExperts
from cluster.transport.codec import decode_combine, decode_dispatch, encode
from cluster.transport.frames import HEADER_BYTES, CombineFrame
from cluster.transport.header import FrameLimits
from cluster.transport.meter import TrafficMeter
from moe_bitnet.errors import ClusterError
from moe_bitnet.generation import generate
from moe_bitnet.router import Routing

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 2, 5, 2, 12

placements = st.integers(1, 4).flatmap(
    lambda num_devices: st.tuples(
        st.lists(
            st.lists(st.integers(0, num_devices - 1), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
            min_size=NUM_LAYERS,
            max_size=NUM_LAYERS,
        ),
        st.just(num_devices),
    )
)
SPREAD = ([[0, 1, 2, 1, 0], [2, 2, 1, 0, 1]], 3)
# device 1 holds nothing of layer 0, the home nothing of layer 1, device 3 nothing at all
GAPS = ([[0, 2, 2, 0, 2], [1, 2, 1, 1, 2]], 4)
ALL_AT_HOME = ([[0] * NUM_EXPERTS] * NUM_LAYERS, 2)


@functools.cache
def shared_model(kind, recipe="squared_relu, odd"):
    return model_of(kind, recipe=recipe)


def distribute(model, device_of_expert, num_devices, combine="float32", dispatch="int8"):
    """A copy of the model with its experts on hosts in this process; also their clients, the meter and the plan."""
    _, placement = place(device_of_expert, num_devices)
    clients, meter = start_local_hosts(model, placement, combine), TrafficMeter()
    remote = copy.deepcopy(model)
    remote.replace_experts([RemoteExperts(index, placement, clients, meter, dispatch) for index in range(NUM_LAYERS)])
    return remote, clients, meter, placement


@torch.inference_mode()
def logits_of(model, token_ids):
    return model(token_ids).logits


def one_layer(clients, placement, dispatch="int8", layer_index=0, epoch=0):
    return RemoteExperts(layer_index, placement, clients, TrafficMeter(), dispatch, epoch)


def random_routing(num_tokens, seed=0):
    choices = random_choices(num_tokens, NUM_EXPERTS, TOP_K, seed)
    weights = torch.rand(num_tokens, TOP_K, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    return Routing(choices, weights, torch.zeros(num_tokens, NUM_EXPERTS))


def random_rows(num_tokens, seed=3):
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


# --- The same answer as one process gives


@settings(max_examples=25, deadline=None, derandomize=True)
@given(placements, st.sampled_from(KINDS), st.sampled_from(list(EXACT_RECIPES)), st.sampled_from([1, 7, 33]))
def test_logits_are_the_local_ones_bit_for_bit_wherever_the_experts_are(plan, kind, recipe, num_tokens):
    model, token_ids = shared_model(kind, recipe), random_token_ids(1, num_tokens)
    remote, *_ = distribute(model, *plan, dispatch=EXACT_DISPATCH[kind])
    assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))


@pytest.mark.parametrize("plan", [SPREAD, GAPS, ALL_AT_HOME])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_keep_every_bit_of_every_kind(kind, plan):
    model, token_ids = shared_model(kind), random_token_ids(3, 11)
    remote, *_ = distribute(model, *plan, dispatch="float32")
    assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_local_one(kind, has_cache):
    model = shared_model(kind)
    remote, *_ = distribute(model, *GAPS, dispatch=EXACT_DISPATCH[kind])
    first, second = (
        generate(each, [5, 17, 2], max_new_tokens=9, cache=ListCache(NUM_LAYERS) if has_cache else None)
        for each in (model, remote)
    )
    assert len(first) == 9
    assert second == first


def test_shared_experts_stay_at_home():
    model = model_of("2bit", num_shared_experts=2)
    token_ids = random_token_ids(1, 7)
    remote, *_ = distribute(model, *SPREAD)
    assert torch.equal(logits_of(remote, token_ids), logits_of(model, token_ids))


def test_the_order_of_answers_does_not_matter():
    """Hosts work in any order; a client may even answer before the next frame is sent."""
    model = shared_model("2bit")
    _, placement = place(*SPREAD)
    hidden_states, routing = random_rows(33), random_routing(33)
    expected = experts_of(model).run(hidden_states, routing)
    clients = start_local_hosts(model, placement)

    class EagerClient(LocalClient):
        def send(self, frame):
            answer = self.host.answer(frame)
            return lambda: answer

    class BackwardClient:
        """Nothing is computed until the first answer is asked for; then the last frame comes first."""

        waiting, answers = [], {}

        def __init__(self, host):
            self.host = host

        def send(self, frame):
            self.waiting.append((self, frame))
            return self.receive

        def receive(self):
            while self.waiting:
                client, frame = self.waiting.pop()
                self.answers[client] = client.host.answer(frame)
            return self.answers[self]

    for kind in (EagerClient, BackwardClient):
        others = [kind(client.host) for client in clients]
        assert torch.equal(one_layer(others, placement).run(hidden_states, routing), expected)


def test_all_frames_leave_before_the_first_answer_is_awaited():
    model = shared_model("2bit")
    _, placement = place(*SPREAD)
    clients = start_local_hosts(model, placement)
    one_layer(clients, placement).run(random_rows(33), random_routing(33))
    assert clients[0].log == ["send"] * 3 + ["receive"] * 3


def test_half_precision_answers_differ_by_their_rounding_alone():
    model = shared_model("2bit")
    _, placement = place(*SPREAD)
    hidden_states, routing = random_rows(33), random_routing(33)
    exact, rounded = (
        one_layer(start_local_hosts(model, placement, combine), placement).run(hidden_states, routing).double()
        for combine in ("float32", "float16")
    )
    # each expert's value is off by at most half a unit in float16's last place, 2**-11 of itself; the weights
    # of a token add up to 1 and float32 adds one rounding for each of its experts
    largest = torch.zeros(33, HIDDEN_SIZE).double()
    for choice in range(TOP_K):
        alone = torch.zeros_like(routing.expert_weights)
        alone[:, choice] = 1
        single = Routing(routing.expert_indices, alone, routing.router_logits)
        row = experts_of(model).run(hidden_states, single).double().abs()
        largest += row * routing.expert_weights[:, choice : choice + 1]
    allowed = largest * (2**-11 + TOP_K * 2**-23) + 2**-25  # 2**-25: half the smallest float16
    assert ((rounded - exact).abs() <= allowed).all()
    assert not torch.equal(rounded, exact)


# --- What crosses


@settings(max_examples=25, deadline=None, derandomize=True)
@given(placements, st.sampled_from([1, 7, 33]), st.integers(0, 99))
def test_a_row_is_sent_once_to_each_device_that_works_on_it(plan, num_tokens, seed):
    model = shared_model("2bit")
    _, placement = place(*plan)
    clients, routing = start_local_hosts(model, placement), random_routing(num_tokens, seed)
    one_layer(clients, placement).run(random_rows(num_tokens), routing)
    device_of_expert = placement.primary_devices(0)
    for device_index, client in enumerate(clients):
        pairs = [
            (token, expert_id)
            for token, experts in enumerate(routing.expert_indices.tolist())
            for expert_id in experts
            if device_of_expert[expert_id] == device_index
        ]
        assert len(client.frames) == bool(pairs)
        for buffer in client.frames:
            frame = decode_dispatch(buffer, FrameLimits())
            assert len(frame.rows) == len({token for token, _ in pairs})
            assert sorted(frame.expert_ids.tolist()) == sorted(expert_id for _, expert_id in pairs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    placements,
    st.sampled_from([1, 7, 33]),
    st.sampled_from(["int8", "float16", "float32"]),
    st.sampled_from(["float16", "float32"]),
)
def test_the_meter_counts_what_the_cost_model_counts(plan, num_tokens, dispatch, combine):
    model, token_ids = shared_model("2bit"), random_token_ids(1, num_tokens)
    remote, clients, meter, placement = distribute(model, *plan, combine, dispatch)
    choices = []
    for block in remote.blocks:
        block.moe.router.register_forward_hook(lambda _, __, routing: choices.append(routing.expert_indices))
    logits_of(remote, token_ids)
    expected = [
        routed_bytes(indices, placement, layer_index, HIDDEN_SIZE, dispatch, combine)
        for layer_index, indices in enumerate(choices)
    ]
    assert len(expected) == NUM_LAYERS
    assert meter.inter_device_bytes(["payload", "metadata"]) == sum(traffic.total_bytes for traffic in expected)
    assert meter.inter_device_bytes(["metadata"]) == sum(traffic.metadata_bytes for traffic in expected)
    away = [frame for client in clients[1:] for frame in client.frames]
    assert meter.inter_device_bytes(["header"]) == HEADER_BYTES * 2 * len(away)  # each frame has an answer
    sent = sum(
        size
        for key, size in meter.totals().items()
        if key.direction == "dispatch" and key.destination != placement.device_names[0]
    )
    assert sent == sum(len(frame) for frame in away)
    assert meter.num_tokens == num_tokens


def test_links_are_named_after_devices():
    model = shared_model("2bit")
    remote, _, meter, _ = distribute(model, *GAPS)
    logits_of(remote, random_token_ids(1, 33))
    links = {(key.layer_index, key.direction, key.source, key.destination) for key in meter.totals()}
    assert links == {
        (layer_index, direction, *(ends if direction == "dispatch" else reversed(ends)))
        for layer_index, devices in enumerate([(0, 2), (1, 2)])
        for ends in (("device-0", f"device-{device}") for device in devices)
        for direction in ("dispatch", "combine")
    }


def test_nothing_crosses_when_the_home_holds_all():
    remote, clients, meter, _ = distribute(shared_model("2bit"), *ALL_AT_HOME)
    logits_of(remote, random_token_ids(1, 33))
    assert meter.inter_device_bytes() == 0
    assert meter.bytes_per_token() == 0
    assert not clients[1].frames


def test_tokens_are_counted_once_and_not_in_every_layer():
    remote, _, meter, _ = distribute(shared_model("2bit"), *SPREAD)
    logits_of(remote, random_token_ids(3, 7))
    assert meter.num_tokens == 21
    generate(remote, [1, 2, 3], max_new_tokens=4, cache=ListCache(NUM_LAYERS))
    assert meter.num_tokens == 21 + 3 + 3  # the last new token is never computed


# --- Answers that are wrong


class FalseClient:
    """Answers every frame with the result of a function of the right answer."""

    def __init__(self, client, falsify):
        self.client, self.falsify = client, falsify

    def send(self, frame):
        receive = self.client.send(frame)
        return lambda: self.falsify(receive())


def changed(**changes):
    """Give a combine frame other fields."""

    def falsify(buffer):
        frame = decode_combine(buffer, FrameLimits())
        fields = {"layer_index": frame.layer_index, "epoch": frame.epoch, "rows": frame.rows}
        return encode(CombineFrame(**{**fields, **{name: change(fields[name]) for name, change in changes.items()}}))

    return falsify


def with_flipped_bit(buffer):
    damaged = bytearray(buffer)
    damaged[-1] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize(
    "falsify",
    [
        changed(rows=lambda rows: rows[1:]),
        changed(rows=lambda rows: torch.cat((rows, rows[:1]))),
        changed(rows=lambda rows: rows[:, 1:].contiguous()),
        changed(rows=lambda rows: rows.new_zeros(0, HIDDEN_SIZE)),
        changed(rows=lambda rows: rows.new_zeros(len(rows), HIDDEN_SIZE + 1)),
        changed(epoch=lambda epoch: epoch + 1),
        changed(layer_index=lambda layer_index: layer_index + 1),
        with_flipped_bit,
        lambda buffer: b"",
        lambda buffer: buffer[:-1],
        lambda buffer: buffer + b"\0",
        lambda buffer: os.urandom(len(buffer)),
    ],
)
@pytest.mark.parametrize("device_index", [0, 2])
def test_an_answer_that_is_no_answer_is_an_error(falsify, device_index):
    _, placement = place(*SPREAD)
    clients = start_local_hosts(shared_model("2bit"), placement)
    clients[device_index] = FalseClient(clients[device_index], falsify)
    with pytest.raises(ClusterError):
        one_layer(clients, placement).run(random_rows(33), random_routing(33))


def test_a_wrong_answer_names_its_host():
    _, placement = place(*SPREAD)
    clients = start_local_hosts(shared_model("2bit"), placement)
    clients[1] = FalseClient(clients[1], changed(epoch=lambda epoch: 7))
    with pytest.raises(ClusterError, match="'device-1' answered layer 0 of plan 7"):
        one_layer(clients, placement).run(random_rows(33), random_routing(33))


def test_hosts_of_another_plan_refuse():
    _, placement = place(*SPREAD)
    clients = start_local_hosts(shared_model("2bit"), placement, epoch=1)
    with pytest.raises(ClusterError, match="follows plan 1, the frame follows plan 2"):
        one_layer(clients, placement, epoch=2).run(random_rows(7), random_routing(7))
    one_layer(clients, placement, epoch=1).run(random_rows(7), random_routing(7))


def test_hosts_of_another_placement_refuse():
    _, placement = place(*SPREAD)
    _, other = place(*GAPS)
    clients = start_local_hosts(shared_model("2bit"), placement)
    with pytest.raises(ClusterError, match=r"does not hold expert|holds no expert|hosts"):
        one_layer([*clients, clients[0]], other).run(random_rows(33), random_routing(33))
