import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.replica_choice import NO_DEVICE, ReplicaTable, choose_devices, pour


def up(*states: int) -> np.ndarray:
    return np.array(states, dtype=bool)


def choose(row: list[int], layer: list[list[int]], load: list[float], is_up: np.ndarray | None = None) -> list[int]:
    up_now = np.ones(len(load), dtype=bool) if is_up is None else is_up
    return choose_devices(np.array([row]), layer, up_now, np.array(load, dtype=float))[0].tolist()


def test_home_is_first_whatever_its_load() -> None:
    assert choose([0], [[2, 1, 0]], [99.0, 0.0, 0.0]) == [0]


def test_a_device_that_is_visited_anyway_comes_before_the_least_loaded() -> None:
    assert choose([0, 1], [[1], [1, 2]], [0.0, 99.0, 0.0]) == [1, 1]


def test_of_several_visited_devices_the_least_loaded_is_taken() -> None:
    assert choose([0, 1, 2], [[1], [2], [1, 2]], [0.0, 5.0, 3.0]) == [1, 2, 2]


def test_else_the_least_loaded_is_taken_and_pairs_of_a_token_meet_there() -> None:
    # expert 0 goes to device 2; experts 1 and 2 then find it visited
    assert choose([2, 1, 0], [[1, 2], [3, 2], [3, 2]], [0.0, 5.0, 3.0, 0.0]) == [2, 2, 2]


def test_dead_copies_are_passed_over_and_none_is_said_so() -> None:
    layer = [[0, 1], [1, 2], [2]]
    assert choose([0, 1, 2], layer, [0.0] * 3, up(1, 0, 1)) == [0, 2, 2]
    assert choose([0, 1, 2], layer, [0.0] * 3, up(0, 1, 0)) == [1, 1, NO_DEVICE]
    assert choose([0, 1, 2], layer, [0.0] * 3, up(0, 0, 0)) == [NO_DEVICE] * 3


def test_a_table_notices_that_devices_come_and_go() -> None:
    table = ReplicaTable([[1, 2]], 3)
    load = np.array([0.0, 1.0, 0.0])
    answers = [
        int(table.choose(np.array([[0]]), is_up, load)[0, 0]) for is_up in (up(1, 1, 1), up(1, 1, 0), up(1, 0, 1))
    ]
    assert answers == [2, 1, 2]
    assert table.choose(np.array([[0]]), up(1, 1, 1), load)[0, 0] == 2


def test_a_batch_does_not_rush_to_one_device() -> None:
    devices = choose_devices(np.zeros((100, 1), int), [[1, 2, 3]], up(1, 1, 1, 1), np.array([0.0, 30.0, 0.0, 20.0]))
    assert np.bincount(devices[:, 0], minlength=4).tolist() == [0, 20, 50, 30]


def test_without_loads_all_devices_were_idle() -> None:
    layer, choices = [[1, 2], [2, 1], [1]], np.array([[0, 1], [1, 2], [2, 0]])
    plain = ReplicaTable(layer, 3).choose(choices, up(1, 1, 1))
    assert np.array_equal(plain, choose_devices(choices, layer, up(1, 1, 1), np.zeros(3)))


@pytest.mark.parametrize(
    ("loads", "num_pairs", "counts"),
    [([0.0], 5, [5]), ([3.0, 1.0], 1, [0, 1]), ([0.0, 0.0, 9.0], 5, [3, 2, 0]), ([4.0, 1.5, 0.0], 7, [0, 3, 4])],
)
def test_pouring_raises_the_fullest_least(loads: list[float], num_pairs: int, counts: list[int]) -> None:
    assert pour(np.array(loads), num_pairs).tolist() == counts


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    num_devices = draw(st.integers(1, 6))
    one = st.lists(st.integers(0, num_devices - 1), min_size=1, max_size=num_devices, unique=True)
    layer = draw(st.lists(one, min_size=1, max_size=9))
    is_up = np.array(draw(st.lists(st.booleans(), min_size=num_devices, max_size=num_devices)))
    load = np.array(draw(st.lists(st.integers(0, 9), min_size=num_devices, max_size=num_devices)), dtype=float)
    return layer, is_up, load


def routing(num_tokens: int, num_experts: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).random((num_tokens, num_experts))
    return noise.argsort(axis=1)[:, : min(4, num_experts)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layers(), st.integers(0, 9), st.integers(0, 99))
def test_every_pair_goes_to_a_live_copy_and_home_and_visited_come_first(
    case: tuple[list[list[int]], np.ndarray, np.ndarray], num_tokens: int, seed: int
) -> None:
    layer, is_up, load = case
    before = load.copy()
    choices = routing(num_tokens, len(layer), seed)
    devices = choose_devices(choices, layer, is_up, load)
    assert devices.shape == choices.shape
    assert np.array_equal(load, before)
    for experts, chosen in zip(choices.tolist(), devices.tolist(), strict=True):
        live = [[device for device in layer[expert] if is_up[device]] for expert in experts]
        forced = {copies[0] for copies in live if len(copies) == 1} | {0 for copies in live if 0 in copies}
        for copies, device in zip(live, chosen, strict=True):
            if not copies:
                assert device == NO_DEVICE
            elif 0 in copies:
                assert device == 0
            else:
                assert device in (set(copies) & forced or copies)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layers(), st.integers(0, 99))
def test_one_token_goes_the_same_way_alone_as_in_a_batch_with_others_that_move_no_load(
    case: tuple[list[list[int]], np.ndarray, np.ndarray], seed: int
) -> None:
    layer, is_up, load = case
    token = routing(1, len(layer), seed)
    # an expert without a copy is nobody's load: a second token that visits only such experts changes nothing
    with_ghosts = [*layer, *([[]] * token.shape[1])]
    ghost = np.arange(len(layer), len(with_ghosts))[None]
    batch = choose_devices(np.concatenate([token, ghost]), with_ghosts, is_up, load)
    assert batch[0].tolist() == choose_devices(token, layer, is_up, load)[0].tolist()
    assert (batch[1] == NO_DEVICE).all()


def test_replicas_even_out_a_hot_expert_over_a_large_batch() -> None:
    generator = np.random.default_rng(0)
    cold = generator.integers(1, 16, (4096, 1))
    choices = np.concatenate([np.zeros((4096, 1), int), cold], axis=1)
    single = [[1 + expert % 4] for expert in range(16)]
    replicated = [[1, 2, 3, 4], *single[1:]]
    up_all, idle = np.ones(5, dtype=bool), np.zeros(5)

    def imbalance(layer: list[list[int]]) -> float:
        loads = np.bincount(choose_devices(choices, layer, up_all, idle).ravel(), minlength=5)[1:]
        return float(loads.max() / loads.mean())

    assert imbalance(single) > 2
    assert imbalance(replicated) < 1.2
