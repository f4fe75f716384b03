import numpy as np
import pytest

from cluster.routing.synthetic import clustered_trace, zipf_trace
from moe_bitnet.errors import ConfigError


def visited_devices(choices: np.ndarray, device_of_expert: np.ndarray) -> float:
    """Mean number of distinct devices of a token."""
    return float(np.mean([len(set(device_of_expert[row].tolist())) for row in choices]))


def test_contiguous_placement_has_no_luck() -> None:
    # 8 (1 - C(112, 8) / C(128, 8)) = 5.34 devices if all sets of 8 experts were equally likely
    trace = clustered_trace(1000, 12, 128, 8)
    means = [visited_devices(trace.layer(layer), np.arange(128) // 16) for layer in range(12)]
    assert np.mean(means) == pytest.approx(5.34, abs=0.1)


def test_tokens_of_a_topic_share_experts() -> None:
    trace = clustered_trace(2000, 1, 128, 8, run_length=2)
    plain = clustered_trace(2000, 1, 128, 8, run_length=2, affinity=0.0)

    def shared(choices: np.ndarray) -> float:
        return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(choices[::2], choices[1::2], strict=True)]))

    assert shared(plain.layer(0)) == pytest.approx(8 * 8 / 128, abs=0.1)  # K² / E by chance
    assert shared(trace.layer(0)) > 5 * shared(plain.layer(0))


def test_zipf_visits_follow_their_rank() -> None:
    visits = np.sort(zipf_trace(20_000, 1, 32, 1, exponent=0.8, seed=3).tokens_per_expert(0))[::-1]
    expected = np.arange(1, 33) ** -0.8
    assert visits / visits.sum() == pytest.approx(expected / expected.sum(), rel=0.15)


def test_layers_differ_and_seeds_repeat() -> None:
    for make in (clustered_trace, zipf_trace):
        trace = make(300, 2, 16, 2, seed=5)
        assert np.array_equal(trace.expert_indices, make(300, 2, 16, 2, seed=5).expert_indices)
        assert not np.array_equal(trace.expert_indices, make(300, 2, 16, 2, seed=6).expert_indices)
        assert trace.tokens_per_expert(0).argsort().tolist() != trace.tokens_per_expert(1).argsort().tolist()


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 7), (33, 3)])
def test_any_size_works(num_experts: int, top_k: int) -> None:
    topics = min(16, num_experts)
    assert clustered_trace(7, 3, num_experts, top_k, num_topics=topics).expert_indices.shape == (7, 3, top_k)
    assert zipf_trace(7, 3, num_experts, top_k).expert_indices.shape == (7, 3, top_k)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 1, 4, 2), "num_tokens"), ((1, 0, 4, 2), "num_layers"), ((1, 1, 4, 5), "top_k is 5 with")],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clustered_trace(*sizes, num_topics=1)
    with pytest.raises(ConfigError, match=message):
        zipf_trace(*sizes)
    with pytest.raises(ConfigError, match="num_topics is 5 with 4"):
        clustered_trace(1, 1, 4, 2, num_topics=5)
