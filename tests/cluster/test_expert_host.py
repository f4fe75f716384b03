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
)

from cluster.expert_host import ExpertHost, slice_experts
from cluster.transport.codec import decode_combine, encode
from cluster.transport.frames import CombineFrame
from cluster.transport.header import FrameLimits
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.errors import ClusterError, PlacementError

ALL_EXPERTS = [0, 1, 2, 3, 4]
SUBSETS = [list(ids) for ids in chain.from_iterable(combinations(ALL_EXPERTS, count) for count in range(1, 6))]


def ask(host, frame):
    return decode_combine(host.answer(encode(frame)), FrameLimits())


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


@pytest.mark.parametrize("kind", KINDS)
def test_float16_rows_give_what_rounded_rows_give_at_home(kind):
    model = model_of(kind)
    hidden_states, choices = random_rows(7, 12).half(), random_choices(7, 5, top_k=2)
    frame, slots = frame_for(hidden_states, choices, ALL_EXPERTS, "float16")
    expected = local_rows(experts_of(model), hidden_states.float(), choices)
    assert torch.equal(ask(host_for(model, ALL_EXPERTS), frame).rows, expected[slots])


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_without_a_pair_changes_nothing(kind):
    model = model_of(kind)
    hidden_states, choices = random_rows(7, 12), random_choices(7, 5, top_k=2)
    host = host_for(model, ALL_EXPERTS)
    for expert_ids in SUBSETS:
        frame, slots = frame_for(hidden_states, choices, expert_ids, EXACT_DISPATCH[kind])
        assert torch.equal(ask(host, frame).rows, local_rows(experts_of(model), hidden_states, choices)[slots])


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_without_pairs_gets_an_answer_without_rows(kind):
    frame, slots = frame_for(random_rows(1, 12), torch.tensor([[0]]), [4], EXACT_DISPATCH[kind])
    assert not slots
    assert ask(host_for(model_of(kind), [4]), frame).rows.shape == (0, 12)


def test_a_half_precision_answer_is_the_rounded_one():
    model, hidden_states, choices = model_of("2bit"), random_rows(33, 12), random_choices(33, 5, top_k=2)
    frame, _ = frame_for(hidden_states, choices, ALL_EXPERTS, "int8")
    exact = ask(host_for(model, ALL_EXPERTS), frame).rows
    assert torch.equal(ask(host_for(model, ALL_EXPERTS, combine="float16"), frame).rows, exact.half())


def test_layers_are_kept_apart():
    model, hidden_states, choices = model_of("base3"), random_rows(7, 12), random_choices(7, 5, top_k=2)
    host = host_for(model, [0, 3])
    host.load(slice_experts(experts_of(model, 1), 1, [1, 3]))
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


@pytest.mark.parametrize("expert_ids", [(0, 1), (1, 2), (3, 4), (2,), (1, 3, 2**31 - 1)])
def test_an_expert_that_is_not_held_is_refused(host, expert_ids):
    missing = min(set(expert_ids) - {1, 3})
    with pytest.raises(ClusterError, match=rf"does not hold expert {missing} of layer 0; it holds \[1, 3\]"):
        ask(host, good_frame(expert_ids))


@pytest.mark.parametrize("epoch", [0, 4, 6, 2**32 - 1])
def test_another_plan_is_refused(host, epoch):
    with pytest.raises(ClusterError, match=f"follows plan 5, the frame follows plan {epoch}"):
        ask(host, good_frame(epoch=epoch))


def test_damage_anywhere_in_a_frame_is_refused(host):
    frame = encode(good_frame())
    for position in range(len(frame)):
        damaged = bytearray(frame)
        damaged[position] ^= 0x10
        with pytest.raises(ClusterError):
            host.answer(bytes(damaged))


def test_a_frame_of_another_length_is_refused(host):
    frame = encode(good_frame())
    for damaged in (b"", frame[:31], frame[:-1], frame + b"\0"):
        with pytest.raises(ClusterError, match="frame refused"):
            host.answer(damaged)


def test_a_combine_frame_is_refused(host):
    with pytest.raises(ClusterError, match="frame refused: kind"):
        host.answer(encode(CombineFrame(0, 5, torch.zeros(1, 12))))


@pytest.mark.parametrize("hidden_size", [1, 11, 13])
def test_rows_of_another_model_are_refused(host, hidden_size):
    with pytest.raises(ClusterError, match="hidden"):
        ask(host, good_frame(hidden_size=hidden_size))


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


# --- Memory


@pytest.mark.parametrize("kind", ["2bit", "base3"])
@pytest.mark.parametrize("expert_ids", [[0], [4], [1, 3], ALL_EXPERTS])
def test_a_slice_weighs_its_experts_exactly(kind, expert_ids):
    model = model_of(kind)
    experts = slice_experts(experts_of(model), 0, expert_ids)
    assert experts.num_bytes == len(expert_ids) * model_sizes(model.config, kind).expert_bytes
    assert host_for(model, expert_ids).held_bytes == experts.num_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_holds_its_experts_alone(kind):
    model = model_of(kind)
    state = experts_of(model).state_dict()
    for name, array in slice_experts(experts_of(model), 0, [1, 4]).tensors.items():
        assert array.dtype == state[name].numpy().dtype
        assert torch.equal(torch.from_numpy(array), state[name][[1, 4]])


def test_a_slice_is_a_copy():
    model = model_of("float32")
    experts = slice_experts(experts_of(model), 0, ALL_EXPERTS)
    before = experts.tensors["up_weight"].copy()
    with torch.no_grad():
        experts_of(model).up_weight.zero_()
    assert (experts.tensors["up_weight"] == before).all()


def test_a_host_is_filled_to_the_last_byte_and_no_further():
    model = model_of("2bit")
    first, second = (slice_experts(experts_of(model, index), index, [0, 2]) for index in (0, 1))
    usable_bytes = first.num_bytes + second.num_bytes
    host = ExpertHost("small", usable_bytes, model.config, model_layout(model))
    assert host.load(first) == first.num_bytes
    assert host.load(second) == host.held_bytes == usable_bytes


@pytest.mark.parametrize("missing_bytes", [1, 33])
def test_what_does_not_fit_is_refused_with_the_missing_bytes(missing_bytes):
    model = model_of("2bit")
    first, second = (slice_experts(experts_of(model, index), index, [0, 2]) for index in (0, 1))
    usable_bytes = first.num_bytes + second.num_bytes - missing_bytes
    host = ExpertHost("small", usable_bytes, model.config, model_layout(model))
    host.load(first)
    with pytest.raises(
        PlacementError, match=rf"'small' holds {first.num_bytes} of .* {missing_bytes} bytes are missing"
    ):
        host.load(second)
    assert host.held_bytes == first.num_bytes
    with pytest.raises(ClusterError, match="holds no expert of layer 1"):
        ask(host, frame_for(random_rows(1, 12), torch.tensor([[0, 2]]), [0, 2], "int8", layer_index=1)[0])
    ask(host, frame_for(random_rows(1, 12), torch.tensor([[0, 2]]), [0, 2], "int8")[0])


def test_a_layer_cannot_be_loaded_twice():
    model = model_of("2bit")
    host = host_for(model, [0, 1])
    held_bytes = host.held_bytes
    with pytest.raises(ClusterError, match="layer 0 already"):
        host.load(slice_experts(experts_of(model), 0, [2]))
    assert host.held_bytes == held_bytes


def test_read_only_weights_are_taken():
    """Ray's object store hands out read-only arrays."""
    model = model_of("base3")
    experts = slice_experts(experts_of(model), 0, [0, 1])
    for array in experts.tensors.values():
        array.setflags(write=False)
    host = ExpertHost("device-0", 10**9, model.config, model_layout(model))
    host.load(experts)
    frame, _ = frame_for(torch.ones(1, 12), torch.tensor([[1]]), [1], "int8")
    assert ask(host, frame).rows.isfinite().all()
