import pytest
import torch

from moe_bitnet.errors import ConfigError
from moe_bitnet.sampling import sample

# probabilities that float32 sums exactly: 1/2, 1/4, 1/8, 1/16, 1/16
PROBABILITIES = torch.tensor([1, 8, 2, 4, 1]) / 16
LOGITS = PROBABILITIES.log()


def draw(logits, count=400, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [sample(logits, generator=generator, **options) for _ in range(count)]


def test_temperature_zero_takes_the_best():
    logits = torch.randn(33)
    assert set(draw(logits, 10)) == {int(logits.argmax())}
    assert isinstance(sample(logits), int)


def test_one_token_is_always_taken():
    assert draw(torch.zeros(1), 3, temperature=1.0) == [0, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, {1}),
        (0.5, {1}),  # the best token alone reaches the sum
        (0.51, {1, 3}),
        (0.75, {1, 3}),
        (0.76, {1, 2, 3}),
        (0.875, {1, 2, 3}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_sum(top_p, expected):
    assert set(draw(LOGITS, temperature=1.0, top_p=top_p)) == expected


def test_samples_follow_the_probabilities():
    counts = torch.tensor(draw(LOGITS, 4000, temperature=1.0)).bincount(minlength=5)
    # four standard deviations of a binomial count
    allowed = 4 * (4000 * PROBABILITIES * (1 - PROBABILITIES)).sqrt()
    assert ((counts - 4000 * PROBABILITIES).abs() <= allowed).all()


def test_kept_tokens_keep_their_ratio():
    counts = torch.tensor(draw(LOGITS, 3000, temperature=1.0, top_p=0.75)).bincount(minlength=5)
    assert abs(int(counts[1]) - 2000) <= 4 * (3000 * 2 / 9) ** 0.5
    assert int(counts[1] + counts[3]) == 3000


def test_temperature_flattens_and_sharpens():
    # p^(1/T), renormalized: at T = 1/2 the best of (1/2, 1/4, 1/8, 1/16, 1/16) has 64/87
    count = draw(LOGITS, 4000, temperature=0.5).count(1)
    assert abs(count - 4000 * 64 / 87) <= 4 * (4000 * 64 * 23 / 87**2) ** 0.5
    flat = torch.tensor(draw(LOGITS, 4000, temperature=1e6)).bincount(minlength=5)
    assert ((flat - 800).abs() <= 4 * (4000 * 0.16) ** 0.5).all()


def test_seeds_repeat_and_differ():
    assert draw(LOGITS, 33, seed=1, temperature=1.0) == draw(LOGITS, 33, seed=1, temperature=1.0)
    assert draw(LOGITS, 33, seed=1, temperature=1.0) != draw(LOGITS, 33, seed=2, temperature=1.0)


def test_excluded_tokens_are_never_taken():
    logits = torch.tensor([0.0, float("-inf"), 1.0])
    assert set(draw(logits, temperature=5.0)) == {0, 2}


@pytest.mark.parametrize("options", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0},
                                     {"top_p": -1.0}, {"top_p": 1.1}, {"top_p": float("nan")}])  # fmt: skip
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError, match=r"temperature .* top_p"):
        sample(LOGITS, **options)
