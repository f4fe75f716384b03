import numpy as np
import pytest

from cluster.routing.trace import RoutingTrace
from moe_bitnet.errors import DataError


def trace_of(num_tokens: int, num_layers: int = 2, num_experts: int = 7, top_k: int = 3, seed: int = 0) -> RoutingTrace:
    noise = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return RoutingTrace(noise.argsort(axis=-1)[..., :top_k], num_experts)


def test_sizes_come_from_the_array() -> None:
    trace = trace_of(33)
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (33, 2, 3, 7)
    assert trace.layer(1).shape == (33, 3)
    assert trace.tokens_per_expert(1).sum() == 99
    assert trace.tokens_per_expert(0).tolist() == [int((trace.layer(0) == expert).sum()) for expert in range(7)]


@pytest.mark.parametrize(("num_experts", "dtype"), [(7, np.int16), (2**15, np.int16), (2**15 + 1, np.int32)])
def test_ids_are_kept_in_the_smallest_of_two_types(num_experts: int, dtype: type) -> None:
    trace = RoutingTrace(np.array([[[0, num_experts - 1]]]), num_experts)
    assert trace.expert_indices.dtype == dtype
    assert trace.expert_indices.tolist() == [[[0, num_experts - 1]]]


@pytest.mark.parametrize("num_tokens", [2, 3, 33])
def test_halves_are_the_past_and_the_future(num_tokens: int) -> None:
    trace = trace_of(num_tokens)
    first, second = trace.split_half()
    assert first.num_tokens - second.num_tokens == num_tokens % 2
    assert np.array_equal(np.concatenate([first.expert_indices, second.expert_indices]), trace.expert_indices)


def test_layers_can_be_chosen() -> None:
    trace = trace_of(5, num_layers=3)
    assert np.array_equal(trace.for_layers([2, 0]).layer(0), trace.layer(2))
    for layers in ([], [3], [-1]):
        with pytest.raises(DataError, match="0 to 2"):
            trace.for_layers(layers)


@pytest.mark.parametrize(
    ("indices", "num_experts", "message"),
    [
        (np.zeros((2, 1, 1)), 4, "float64"),
        (np.zeros((2, 1), int), 4, r"int64 \[2, 1\]"),
        ([[[0]]], 4, "list"),
        (np.zeros((0, 1, 1), int), 4, "empty"),
        (np.zeros((1, 1, 0), int), 4, "empty"),
        (np.array([[[0, 4]]]), 4, "range from 0 to 4; a layer has the experts 0 to 3"),
        (np.array([[[-1, 3]]]), 4, "range from -1"),
        (np.array([[[1, 0]], [[2, 2]]]), 4, "twice"),
        (np.array([[[0]]]), 0, "num_experts is 0"),
        (np.array([[[0]]]), True, "num_experts is True"),
        (np.array([[[0]]]), 2**31, "num_experts"),
    ],
)
def test_what_is_no_routing_is_refused(indices: np.ndarray, num_experts: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RoutingTrace(indices, num_experts)


def test_one_token_has_no_halves() -> None:
    with pytest.raises(DataError, match="in half"):
        trace_of(1).split_half()
