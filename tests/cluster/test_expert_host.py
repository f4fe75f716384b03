from itertools import chain, combinations

import pytest
import torch
from host_factories import (
    EXACT_DISPATCH,
    EXACT_RECIPES,
    FLOAT_KINDS,
    KINDS,
    TERNARY_KINDS,
    experts_of,
    frame_for,
    host_for,
    local_rows,
    model_of,
    random_choices,
    store_of,
)

from cluster.expert_host import ExpertHost
from cluster.expert_store import slice_experts
from cluster.partial_sums import sum_pairs, to_format
from cluster.transport.codec import decode, encode
from cluster.transport.frames import CombineFrame, DispatchFrame, ProbeFrame, RefusalFrame
from cluster.transport.header import FrameLimits
from cluster.transport.row_format import Combine
from moe_bitnet.errors import ClusterError, FrameError, StalePlanError

ALL_EXPERTS = [0, 1, 2, 3, 4]
SUBSETS = [list(ids) for ids in chain.from_iterable(combinations(ALL_EXPERTS, count) for count in range(1, 6))]
ROW_FORMATS = ("int8", "float16", "bfloat16", "float32")


def ask(host, frame, request_id=7):
    received = decode(host.answer(encode(frame, request_id)), FrameLimits())
    assert received.request_id == request_id
    assert isinstance(received.frame, CombineFrame)
    return received.frame


def random_rows(num_tokens, hidden_size):
    return torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(3))


# --- Answers


@pytest.mark.parametrize("recipe", EXACT_RECIPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_every_subset_answers_as_the_local_experts_bit_for_bit(kind, num_tokens, recipe):
    model = model_of(kind, recipe=recipe, hidden_size=33, num_layers=1)
    hidden_states, choices = random_rows(num_tokens, 33), random_choices(num_tokens, 5, top_k=2)
    expected = local_rows(experts_of(model), hidden_states, choices)
    for expert_ids in SUBSETS:
        frame, slots = frame_for(hidden_states, choices, expert_ids, EXACT_DISPATCH[kind])
        if slots:
            answer = ask(host_for(model, expert_ids), frame)
            assert answer.rows.dtype == torch.float32
            assert torch.equal(answer.rows, expected[slots]), expert_ids


@pytest.mark.parametrize("kind", TERNARY_KINDS)
def test_float32_rows_are_quantized_on_arrival_to_the_same_bits(kind):
    model = model_of(kind)
    hidden_states, choices = random_rows(7, 12), random_choices(7, 5, top_k=2)
    frame, slots = frame_for(hidden_states, choices, ALL_EXPERTS, "float32")
    expected = local_rows(experts_of(model), hidden_states, choices)
    assert torch.equal(ask(host_for(model, ALL_EXPERTS), frame).rows, expected[slots])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rows_give_what_rounded_rows_give_at_home(kind, dtype):
    model = model_of(kind)
    hidden_states, choices = random_rows(7, 12).to(dtype), random_choices(7, 5, top_k=2)
    frame, slots = frame_for(hidden_states, choices, ALL_EXPERTS, "float")
    assert frame.rows.dtype == dtype
    expected = local_rows(experts_of(model), hidden_states.float(), choices)
    assert torch.equal(ask(host_for(model, ALL_EXPERTS), frame).rows, expected[slots])


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
@pytest.mark.parametrize("kind", ["2bit", "float32"])
def test_the_answer_is_what_the_frame_asked_for(kind, mode, row_format):
    """Rows or weighted sums, rounded to the format: computed here from the exact rows."""
    model, combine = model_of(kind), Combine(mode, row_format)
    hidden_states, choices = random_rows(7, 12), random_choices(7, 5, top_k=3)
    weights = torch.rand(7, 3, generator=torch.Generator().manual_seed(4))
    for expert_ids in ([0], [1, 3], ALL_EXPERTS):
        frame, slots = frame_for(
            hidden_states, choices, expert_ids, EXACT_DISPATCH[kind], weights=weights, combine=combine
        )
        rows = local_rows(experts_of(model), hidden_states, choices)[slots]
        if mode == "partial_sums":
            rows = sum_pairs(rows, weights.flatten()[slots], frame.pairs_per_row)
        expected, scales = to_format(rows, combine.row_format)
        answer = ask(host_for(model, expert_ids), frame)
        assert answer.row_format == row_format
        assert len(answer.rows) == frame.num_answer_rows
        assert torch.equal(answer.rows, expected)
        assert scales is None or torch.equal(answer.scales, scales)


@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_without_rows_gets_an_answer_without_rows(kind, mode):
    frame, slots = frame_for(
        random_rows(1, 12), torch.tensor([[0]]), [4], EXACT_DISPATCH[kind], combine=Combine(mode, "float32")
    )
    assert not slots
    assert ask(host_for(model_of(kind), [4]), frame).rows.shape == (0, 12)


def test_layers_are_kept_apart():
    model, hidden_states, choices = model_of("base3"), random_rows(7, 12), random_choices(7, 5, top_k=2)
    host = host_for(model, [0, 3])
    host.store.load(slice_experts(experts_of(model, 1), 1, [1, 3]))
    for layer_index, expert_ids in ((0, [0, 3]), (1, [1, 3])):
        frame, slots = frame_for(hidden_states, choices, expert_ids, "int8", layer_index)
        answer = ask(host, frame)
        assert answer.layer_index == layer_index
        expected = local_rows(experts_of(model, layer_index), hidden_states, choices)
        assert torch.equal(answer.rows, expected[slots])


# --- Refusals


@pytest.fixture
def host():
    return host_for(model_of("2bit"), [1, 3], epoch=5)


def good_frame(expert_ids=(1, 3), layer_index=0, epoch=5, hidden_size=12):
    choices = torch.tensor([expert_ids])
    return frame_for(random_rows(1, hidden_size), choices, expert_ids, "int8", layer_index, epoch)[0]


def test_an_unknown_layer_is_refused(host):
    with pytest.raises(ClusterError, match="'device-0' holds no expert of layer 1"):
        ask(host, good_frame(layer_index=1))


@pytest.mark.parametrize("expert_ids", [(0, 1), (1, 2), (3, 4), (2,), (1, 3, 2**16 - 1)])
def test_an_expert_that_is_not_held_is_refused(host, expert_ids):
    missing = min(set(expert_ids) - {1, 3})
    with pytest.raises(ClusterError, match=rf"does not hold expert {missing} of layer 0; it holds \[1, 3\]"):
        ask(host, good_frame(expert_ids))


def test_damage_anywhere_in_a_frame_is_refused(host):
    frame = encode(good_frame())
    for position in range(len(frame)):
        damaged = bytearray(frame)
        damaged[position] ^= 0x10
        with pytest.raises(FrameError):
            host.answer(bytes(damaged))


@pytest.mark.parametrize("frame", [CombineFrame(0, 5, torch.zeros(1, 12)), RefusalFrame("failure", "no")])
def test_a_frame_that_only_hosts_send_is_refused(host, frame):
    with pytest.raises(FrameError, match="a host takes"):
        host.answer(encode(frame))


@pytest.mark.parametrize("hidden_size", [1, 11, 13, 4096])
def test_rows_of_another_model_are_refused_without_dropping_the_connection(host, hidden_size):
    with pytest.raises(ClusterError, match=f"hidden_size 12, the frame has rows of {hidden_size}") as caught:
        ask(host, good_frame(hidden_size=hidden_size))
    assert not isinstance(caught.value, FrameError)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_float_experts_refuse_int8_rows(kind):
    """Without the scales the products would be plausible and wrong."""
    frame, _ = frame_for(random_rows(1, 12), torch.tensor([[1, 3]]), [1, 3], "int8")
    with pytest.raises(ClusterError, match="float experts, which take no int8 rows"):
        ask(host_for(model_of(kind), [1, 3]), frame)


def test_a_refusal_leaves_the_host_as_it_was(host):
    before = ask(host, good_frame()).rows
    with pytest.raises(ClusterError):
        ask(host, good_frame((0, 1)))
    assert torch.equal(ask(host, good_frame()).rows, before)


@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
def test_a_frame_that_asks_for_more_than_frames_hold_is_refused_before_it_is_computed(mode, monkeypatch):
    """Two bytes ask for one more output of a row: a small frame could take all memory of its host."""
    host = host_for(model_of("2bit", hidden_size=33), [1])
    host.limits = FrameLimits(max_frame_bytes=10_000)
    ask(host, repeated_frame(mode, num_rows=20, pairs=1))
    monkeypatch.setattr(host.store, "compute", None)
    frame = repeated_frame(mode, num_rows=20, pairs=60)
    assert len(encode(frame)) < 10_000
    with pytest.raises(ClusterError, match=r"1200 outputs of 33 values need 158400 bytes.*Run fewer tokens"):
        ask(host, frame)


def repeated_frame(mode, num_rows, pairs):
    """Rows that go to expert 1 and to it again."""
    return DispatchFrame(
        layer_index=0,
        epoch=0,
        rows=torch.ones(num_rows, 33, dtype=torch.int8),
        scales=torch.ones(num_rows, 1),
        expert_ids=torch.ones(num_rows * pairs, dtype=torch.int64),
        pairs_per_row=torch.full((num_rows,), pairs),
        expert_weights=torch.ones(num_rows * pairs) if mode == "partial_sums" else None,
        combine=Combine(mode, "float32"),
    )


# --- Plans


@pytest.mark.parametrize("epoch", [0, 4, 6, 2**32 - 1])
def test_another_plan_is_refused(host, epoch):
    with pytest.raises(StalePlanError, match=f"follows plan 5, the frame follows plan {epoch}"):
        ask(host, good_frame(epoch=epoch))


def test_two_plans_are_followed_until_the_older_is_left(host):
    host.follow(6)
    assert host.epoch == 6
    for epoch in (5, 6):
        assert ask(host, good_frame(epoch=epoch)).epoch == epoch
    host.leave_before(6)
    assert ask(host, good_frame(epoch=6)).epoch == 6
    with pytest.raises(StalePlanError, match="follows plan 6, the frame follows plan 5"):
        ask(host, good_frame(epoch=5))


def test_a_host_that_left_every_plan_still_says_that_it_is_there(host):
    host.leave_before(9)
    with pytest.raises(StalePlanError):
        ask(host, good_frame(epoch=5))
    assert decode(host.answer(encode(ProbeFrame(), 3)), FrameLimits()).frame == ProbeFrame(5)


def test_a_probe_comes_back_with_the_newest_plan(host):
    for epoch in (5, 8):
        host.follow(epoch)
        received = decode(host.answer(encode(ProbeFrame(1), 2**32 - 1)), FrameLimits())
        assert (received.frame, received.request_id) == (ProbeFrame(epoch), 2**32 - 1)


def test_experts_that_leave_with_their_plan_while_a_frame_waits_are_a_stale_plan():
    """A second dispatcher can ask again by the new plan; a missing expert would end its run."""
    model = model_of("2bit")
    store = store_of(model)
    store.load(slice_experts(experts_of(model), 0, [1, 3]))
    host = ExpertHost(store, epoch=5)
    compute = store.compute

    def meanwhile(*arguments):
        host.follow(6)
        host.leave_before(6)
        store.keep_only(0, [3])
        return compute(*arguments)

    store.compute = meanwhile
    with pytest.raises(StalePlanError, match="follows plan 6, the frame follows plan 5"):
        ask(host, good_frame(epoch=5))
    with pytest.raises(ClusterError, match="does not hold expert 1"):
        ask(host, good_frame(epoch=6))
