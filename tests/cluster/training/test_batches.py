import numpy as np
import pytest

from cluster.training.batches import TokenBatches, batch_at, count_windows, validation_batches
from moe_bitnet.errors import ConfigError, DataError

TOKENS = np.arange(1, 7 * 33 + 5, dtype=np.int32)  # 33 windows of 7 and a remainder

GOLDEN_ORDER = [[64, 218, 113, 15], [78, 197, 71, 127]]  # of steps 0 and 100 with batches of 4 and seed 1


def first_tokens(batch):
    return batch[0][:, 0].tolist()


def test_targets_are_the_successors_of_inputs():
    inputs, targets = batch_at(TOKENS, step=3, batch_size=5, seq_len=7)
    assert inputs.shape == targets.shape == (5, 7)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    np.testing.assert_array_equal(targets, inputs + 1)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (4, 3), (50, 2)])
def test_every_epoch_visits_each_window_once(batch_size, world_size):
    """Also when a batch reaches over the end of one epoch, or over several."""
    num_epochs, num_windows = 4, 33
    num_steps = -(-num_epochs * num_windows // (batch_size * world_size))
    visited = [
        first
        for step in range(num_steps)
        for rank in range(world_size)
        for first in first_tokens(batch_at(TOKENS, step, batch_size, 7, seed=5, rank=rank, world_size=world_size))
    ]
    orders = [visited[epoch * num_windows : (epoch + 1) * num_windows] for epoch in range(num_epochs)]
    for order in orders:
        assert sorted(order) == list(range(1, 7 * 33, 7))
    assert orders[0] != orders[1] != sorted(orders[1])


def test_a_batch_depends_on_the_step_number_alone():
    batches = TokenBatches(TOKENS, batch_size=4, seq_len=7, seed=2)
    forward = [first_tokens(batches.at(step)) for step in range(30)]
    backward = [first_tokens(batches.at(step)) for step in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward[17] == first_tokens(batch_at(TOKENS, 17, 4, 7, seed=2))
    assert forward != [first_tokens(batch_at(TOKENS, step, 4, 7, seed=3)) for step in range(30)]


def test_ranks_together_see_what_one_worker_would():
    alone = first_tokens(batch_at(TOKENS, 2, batch_size=6, seq_len=7))
    shared = [first_tokens(batch_at(TOKENS, 2, 2, 7, rank=rank, world_size=3)) for rank in range(3)]
    assert alone == [first for part in shared for first in part]


@pytest.mark.parametrize(("world_size", "num_parts"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_a_run_goes_on_with_other_workers_and_micro_steps(world_size, num_parts):
    """From any step on, the batches of all workers and micro-steps joined are that of one worker in one piece."""
    whole = TokenBatches(TOKENS, batch_size=6, seq_len=7, seed=4)
    workers = [
        TokenBatches(TOKENS, 6 // (world_size * num_parts), 7, 4, rank, world_size) for rank in range(world_size)
    ]
    for step in (11, 5, 6):  # 5 reaches over the end of the first epoch
        micro_steps = range(step * num_parts, (step + 1) * num_parts)
        parts = [worker.at(micro_step)[0] for micro_step in micro_steps for worker in workers]
        np.testing.assert_array_equal(np.concatenate(parts), whole.at(step)[0])


def test_the_order_is_the_same_under_every_numpy():
    assert [first_tokens(batch_at(TOKENS, step, 4, 7, seed=1)) for step in (0, 100)] == GOLDEN_ORDER


def test_steps_per_epoch_counts_all_ranks():
    assert TokenBatches(TOKENS, 3, 7, world_size=11).steps_per_epoch == 1.0


def test_a_memory_map_will_do(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    np.testing.assert_array_equal(batch_at(mapped, 1, 2, 7)[0], batch_at(TOKENS, 1, 2, 7)[0])


def test_validation_spreads_its_windows_over_the_text():
    batches = list(validation_batches(TOKENS, batch_size=4, seq_len=7, max_windows=9))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 1]
    # 33 windows, 9 of them: every 3.67th
    windows = np.array([0, 3, 7, 11, 14, 18, 22, 25, 29])
    inputs = np.concatenate([inputs for inputs, _ in batches])
    np.testing.assert_array_equal(inputs, 1 + 7 * windows[:, None] + np.arange(7))
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in batches]), inputs + 1)


def test_validation_without_a_limit_takes_all_windows_in_order():
    inputs = np.concatenate([inputs for inputs, _ in validation_batches(TOKENS, 4, 7)])
    np.testing.assert_array_equal(inputs.ravel(), TOKENS[: 33 * 7])
    assert sum(len(inputs) for inputs, _ in validation_batches(TOKENS, 4, 7)) == 33
    assert sum(len(inputs) for inputs, _ in validation_batches(TOKENS, 4, 7, max_windows=1000)) == 33


@pytest.mark.parametrize(("num_tokens", "seq_len", "expected"), [(8, 7, 1), (14, 7, 1), (15, 7, 2), (2, 1, 1)])
def test_a_window_needs_one_token_more_than_its_inputs(num_tokens, seq_len, expected):
    assert count_windows(TOKENS[:num_tokens], seq_len) == expected
    batch_at(TOKENS[:num_tokens], 9, 2, seq_len)


def test_too_few_tokens_are_refused():
    for num_tokens in (0, 1, 7):
        with pytest.raises(DataError, match="too few"):
            batch_at(TOKENS[:num_tokens], 0, 1, 7)
        with pytest.raises(DataError, match="too few"):
            validation_batches(TOKENS[:num_tokens], 1, 7)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"seq_len": 0}, {"step": -1}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"seed": -1}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"Pass|counted"):
        batch_at(TOKENS, **({"step": 0, "batch_size": 2, "seq_len": 7} | wrong))
    with pytest.raises(ConfigError, match="max_windows=0"):
        validation_batches(TOKENS, 1, 7, max_windows=0)
