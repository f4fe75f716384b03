import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from host_factories import KINDS, TERNARY_KINDS, experts_of, local_rows, model_of, random_choices, store_of

from cluster.expert_store import ExpertSlice, join_slices, slice_experts
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.errors import ClusterError, ConfigError, PlacementError, ShapeError

ALL_EXPERTS = [0, 1, 2, 3, 4]
LOADS = (
    [ALL_EXPERTS],
    [[0, 1], [2, 3, 4]],
    [[1, 3], [0, 4], [2]],
    [[4], [3], [2], [1], [0]],
)
"""Ways to load all experts of a layer: at once, or in groups."""


def random_rows(num_tokens, hidden_size=12):
    return torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(3))


def loaded(model, loads, layer_index=0):
    store = store_of(model)
    for expert_ids in loads:
        store.load(slice_experts(experts_of(model, layer_index), layer_index, expert_ids))
    return store


def compute_all(store, experts, hidden_states, choices, layer_index=0):
    """Run every (token, choice) pair in its order."""
    pairs_per_row = torch.full((len(choices),), choices.shape[1])
    with torch.inference_mode():
        return store.compute(layer_index, experts.prepare(hidden_states), pairs_per_row, choices.flatten())


# --- Bits


@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_whole_layer_whatever_was_loaded_together(kind, num_tokens):
    model = model_of(kind, hidden_size=33, num_layers=1)
    experts, hidden_states = experts_of(model), random_rows(num_tokens, 33)
    choices = random_choices(num_tokens, 5, top_k=3)
    expected = local_rows(experts, hidden_states, choices)
    for loads in LOADS:
        store = loaded(model, loads)
        assert store.expert_ids(0) == ALL_EXPERTS
        outputs = compute_all(store, experts, hidden_states, choices)
        assert outputs.dtype == torch.float32
        assert torch.equal(outputs, expected), loads


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_and_merging_changes_no_bit(kind):
    model = model_of(kind)
    experts, hidden_states = experts_of(model), random_rows(7)
    kept = [0, 2, 3]
    choices = torch.tensor(list(itertools.islice(itertools.cycle(itertools.permutations(kept, 2)), 7)))
    expected = local_rows(experts, hidden_states, choices)
    for loads in LOADS:
        store = loaded(model, loads)
        num_bytes = store.held_bytes
        assert store.keep_only(0, ALL_EXPERTS) == num_bytes  # merged, all of them
        assert store.keep_only(0, kept) == slice_experts(experts, 0, kept).num_bytes
        assert store.expert_ids(0) == kept
        assert torch.equal(compute_all(store, experts, hidden_states, choices), expected)
        store.load(slice_experts(experts, 0, [1]))  # what was dropped may come back
        assert store.expert_ids(0) == [0, 1, 2, 3]
        assert torch.equal(compute_all(store, experts, hidden_states, choices), expected)


def test_rows_with_different_numbers_of_experts_and_the_same_expert_twice():
    model = model_of("2bit")
    experts, hidden_states = experts_of(model), random_rows(3)
    ids, pairs_per_row = torch.tensor([4, 0, 0, 2, 3]), torch.tensor([1, 3, 1])
    outputs = loaded(model, LOADS[2]).compute(0, experts.prepare(hidden_states), pairs_per_row, ids)
    for pair, (row, expert_id) in enumerate(((0, 4), (1, 0), (1, 0), (1, 2), (2, 3))):
        alone = local_rows(experts, hidden_states[row : row + 1], torch.tensor([[expert_id]]))
        assert torch.equal(outputs[pair], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs_are_no_outputs(kind):
    model = model_of(kind)
    for store in (loaded(model, LOADS[1]), store_of(model)):
        rows = experts_of(model).prepare(torch.empty(0, 12))
        none = torch.empty(0, dtype=torch.int64)
        assert store.compute(0, rows, none, none).shape == (0, 12)


def test_layers_are_kept_apart():
    model = model_of("base3")
    store = loaded(model, [[0, 3]])
    store.load(slice_experts(experts_of(model, 1), 1, [1, 3]))
    assert store.all_expert_ids() == {0: [0, 3], 1: [1, 3]}
    hidden_states, choices = random_rows(2), torch.tensor([[3], [3]])
    for layer_index in (0, 1):
        experts = experts_of(model, layer_index)
        outputs = compute_all(store, experts, hidden_states, choices, layer_index)
        assert torch.equal(outputs, local_rows(experts, hidden_states, choices))
    store.keep_only(0, [])
    assert store.all_expert_ids() == {1: [1, 3]}
    assert store.keep_only(7, [1]) == store.held_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_prepared_as_at_home(kind):
    model, hidden_states = model_of(kind), random_rows(7)
    prepared, expected = loaded(model, LOADS[1]).prepare(hidden_states), experts_of(model).prepare(hidden_states)
    assert torch.equal(prepared.rows, expected.rows)
    assert (prepared.activation_scale is None) == (kind not in TERNARY_KINDS)
    if kind in TERNARY_KINDS:
        assert torch.equal(prepared.activation_scale, expected.activation_scale)


# --- What is not here


def test_an_expert_that_is_not_held_is_refused_never_skipped():
    model = model_of("2bit")
    store, experts = loaded(model, [[1], [3]]), experts_of(model)
    for missing in (0, 2, 4, 65535):
        with pytest.raises(ClusterError, match=rf"does not hold expert {missing} of layer 0; it holds \[1, 3\]"):
            compute_all(store, experts, random_rows(1), torch.tensor([[1, missing, 3]]))
    with pytest.raises(ClusterError, match="holds no expert of layer 1"):
        compute_all(store, experts, random_rows(1), torch.tensor([[1]]), layer_index=1)
    with pytest.raises(ClusterError, match="holds no expert"):
        store_of(model).prepare(random_rows(1))


def test_an_expert_that_is_here_cannot_be_loaded_again():
    model = model_of("2bit")
    store = loaded(model, [[0, 1], [4]])
    held_bytes = store.held_bytes
    for expert_ids in ([0], [2, 4], ALL_EXPERTS):
        with pytest.raises(ClusterError, match=r"holds expert \d of layer 0 already"):
            store.load(slice_experts(experts_of(model), 0, expert_ids))
    assert (store.held_bytes, store.expert_ids(0)) == (held_bytes, [0, 1, 4])


def test_no_experts_can_be_loaded_without_harm():
    model = model_of("2bit")
    store = loaded(model, [[], [0, 1], []])
    assert store.all_expert_ids() == {0: [0, 1]}
    compute_all(store, experts_of(model), random_rows(2), torch.tensor([[0], [1]]))
    assert store_of(model).load(slice_experts(experts_of(model), 0, [])) == 0


# --- Memory


@pytest.mark.parametrize("kind", ["2bit", "base3"])
@pytest.mark.parametrize("expert_ids", [[0], [4], [1, 3], ALL_EXPERTS])
def test_a_slice_weighs_its_experts_exactly(kind, expert_ids):
    model = model_of(kind)
    experts = slice_experts(experts_of(model), 0, expert_ids)
    assert experts.num_bytes == len(expert_ids) * model_sizes(model.config, kind).expert_bytes
    assert loaded(model, [expert_ids]).held_bytes == experts.num_bytes


def test_a_store_is_filled_to_the_last_byte_and_no_further():
    model = model_of("2bit")
    first, second = (slice_experts(experts_of(model, index), index, [0, 2]) for index in (0, 1))
    store = store_of(model, first.num_bytes + second.num_bytes)
    assert store.load(first) == first.num_bytes
    assert store.load(second) == store.held_bytes == store.usable_bytes
    assert store.keep_only(0, [2]) == store.usable_bytes - first.num_bytes // 2
    assert store.load(slice_experts(experts_of(model), 0, [3])) == store.usable_bytes


@pytest.mark.parametrize("missing_bytes", [1, 33])
def test_what_does_not_fit_is_refused_with_the_missing_bytes(missing_bytes):
    model = model_of("2bit")
    first, second = (slice_experts(experts_of(model, index), index, [0, 2]) for index in (0, 1))
    store = store_of(model, first.num_bytes + second.num_bytes - missing_bytes, "small")
    store.load(first)
    message = (
        rf"'small' holds {first.num_bytes} of {store.usable_bytes} bytes and was asked to load {second.num_bytes} "
        rf"more: {missing_bytes} bytes are missing"
    )
    with pytest.raises(PlacementError, match=message):
        store.load(second)
    assert store.held_bytes == first.num_bytes
    assert store.all_expert_ids() == {0: [0, 2]}
    compute_all(store, experts_of(model), random_rows(1), torch.tensor([[0, 2]]))


# --- Loading while another thread computes


@pytest.mark.parametrize("kind", ["2bit", "float32"])
def test_loading_and_dropping_while_another_thread_computes_changes_no_bit(kind):
    model = model_of(kind)
    experts, hidden_states = experts_of(model), random_rows(7)
    choices = random_choices(7, 2, top_k=2)  # experts 0 and 1 alone, which stay
    expected = local_rows(experts, hidden_states, choices)
    store, is_over, failures, num_rounds = loaded(model, [[0], [1]]), threading.Event(), [], 0

    def compute():
        nonlocal num_rounds
        while not is_over.is_set():
            try:
                store.prepare(hidden_states)
                if not torch.equal(compute_all(store, experts, hidden_states, choices), expected):
                    failures.append("other bits")
            except Exception as error:  # noqa: BLE001  a thread has nobody else to tell
                failures.append(repr(error))
            num_rounds += 1

    thread = threading.Thread(target=compute)
    thread.start()
    for layer_index, others in itertools.islice(itertools.cycle([(0, [2, 4]), (0, [3]), (1, [1, 2])]), 60):
        store.load(slice_experts(experts_of(model, layer_index), layer_index, others))
        store.keep_only(0, [0, 1])
        store.keep_only(1, [])
    is_over.set()
    thread.join()
    assert not failures
    assert num_rounds > 10
    assert store.all_expert_ids() == {0: [0, 1]}


def test_who_reads_all_layers_is_not_disturbed_by_a_new_one():
    """A dictionary that grows while another thread walks through it is an error in Python."""
    model = model_of("2bit")
    store = loaded(model, [[0]])
    before = store._groups
    store.load(slice_experts(experts_of(model, 1), 1, [0]))
    store.load(slice_experts(experts_of(model), 0, [1]))
    store.keep_only(1, [])
    assert list(before) == [0]
    assert len(before[0]) == 1


# --- Slices


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


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_store_gives_away_is_what_it_got(kind):
    model = model_of(kind)
    for loads in LOADS:
        store = loaded(model, loads)
        for expert_ids in ([0], [1, 4], [0, 2, 3], ALL_EXPERTS):
            assert_same(store.slice(0, expert_ids), slice_experts(experts_of(model), 0, expert_ids))
    assert store.slice(0, []) is None
    with pytest.raises(ClusterError, match="does not hold expert 7 of layer 0"):
        store.slice(0, [1, 7])
    with pytest.raises(ClusterError, match="no expert of layer 1"):
        store.slice(1, [1])


def assert_same(left, right):
    assert (left.layer_index, left.expert_ids, left.tensors.keys()) == (
        right.layer_index,
        right.expert_ids,
        right.tensors.keys(),
    )
    for name, array in left.tensors.items():
        assert array.dtype == right.tensors[name].dtype
        assert np.array_equal(array, right.tensors[name])


@pytest.mark.parametrize("expert_ids", [[0], [1, 2], [0, 2, 4], ALL_EXPERTS])
def test_slices_are_joined_from_whatever_holds_them(expert_ids):
    experts = experts_of(model_of("base3"))
    expected = slice_experts(experts, 1, expert_ids)
    for parts in (*LOADS, [[0, 1, 2], [1, 2, 3, 4]], [[0, 4], ALL_EXPERTS]):
        assert_same(join_slices([slice_experts(experts, 1, part) for part in parts], expert_ids), expected)


def test_an_expert_that_no_slice_holds_is_named():
    experts = experts_of(model_of("2bit"))
    with pytest.raises(ClusterError, match=r"experts \[3\] of layer 1 are in none of the slices given.*\[0, 2\]"):
        join_slices([slice_experts(experts, 1, [0]), slice_experts(experts, 1, [2])], [0, 3])


@pytest.mark.parametrize("expert_ids", [[1, 0], [0, 0], [2, 1, 0]])
def test_ids_that_do_not_ascend_are_refused(expert_ids):
    """They are searched by bisection: out of order, rows could go to another expert without a word."""
    with pytest.raises(ShapeError, match="ascending"):
        slice_experts(experts_of(model_of("2bit")), 0, expert_ids)


def test_a_slice_with_more_ids_than_weights_is_refused():
    experts = slice_experts(experts_of(model_of("2bit")), 0, [0, 1])
    with pytest.raises(ShapeError, match=r"give \[3, ...\], one row for each expert"):
        dataclasses.replace(experts, expert_ids=[0, 1, 2])
    with pytest.raises(ShapeError, match=r"has the shape \[\]"):
        ExpertSlice(0, [1], {"gate_scale": np.float32(1).reshape(())})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("2bit", {"hidden_size": 48}),
        ("2bit", {"intermediate_size": 33}),
        ("base3", {}),
        ("latent", {}),
        ("float32", {}),
    ],
    ids=str,
)
def test_experts_of_another_model_are_refused_and_nothing_is_loaded(kind, changes):
    store = loaded(model_of("2bit", hidden_size=33), [[0]])
    held_bytes = store.held_bytes
    other = model_of(kind, **{"hidden_size": 33, **changes})
    with pytest.raises(ConfigError, match="the experts of layer 0 are none of this model"):
        store.load(slice_experts(experts_of(other), 0, [1, 2]))
    assert (store.held_bytes, store.expert_ids(0)) == (held_bytes, [0])


def test_read_only_weights_are_taken():
    """Ray's object store hands out read-only arrays."""
    model = model_of("base3")
    experts = slice_experts(experts_of(model), 0, [0, 1])
    for array in experts.tensors.values():
        array.setflags(write=False)
    store = store_of(model)
    store.load(experts)
    choices = torch.tensor([[1, 0]])
    outputs = compute_all(store, experts_of(model), random_rows(1), choices)
    assert torch.equal(outputs, local_rows(experts_of(model), random_rows(1), choices))
