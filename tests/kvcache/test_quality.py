import math

import pytest
import torch

from kvcache.quality import (
    MAX_NEEDLES,
    Answer,
    LogitComparison,
    hide_needles,
    make_needles,
    pair_answers,
    score_answer,
)
from moe_bitnet.errors import ConfigError, ShapeError


def compare(reference, logits, targets, sizes=None):
    comparison = LogitComparison()
    sizes = sizes or [len(targets)]
    for part in zip(reference.split(sizes), logits.split(sizes), targets.split(sizes), strict=True):
        comparison.add(*part)
    return comparison.result()


def test_divergence_is_that_of_the_formula():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    result = compare(p.log()[None] + 7, q.log()[None] - 3, torch.tensor([1]))  # a constant changes nothing
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert result.kld_mean == pytest.approx(expected, rel=1e-6)
    assert result.kld_median == result.kld_p999 == result.kld_mean
    assert result.top1_agreement == 0.0
    assert result.ppl == pytest.approx(2.0, rel=1e-6)
    assert result.reference_ppl == pytest.approx(4.0, rel=1e-6)
    assert result.ppl_change == pytest.approx(-0.5, rel=1e-6)


def test_small_divergences_are_not_lost_in_rounding():
    reference = torch.randn(50, 1000) * 4
    change = torch.randn(50, 1000) * 1e-3
    logits = reference + change
    # to second order, KLD is half the variance of the change under p
    p = reference.double().softmax(-1)
    change = (logits - reference).double()
    expected = ((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean() / 2
    result = compare(reference, logits, torch.zeros(50, dtype=torch.int64))
    assert result.kld_mean == pytest.approx(float(expected), rel=5e-3)


def test_chunks_do_not_matter():
    reference, logits, targets = torch.randn(133, 40), torch.randn(133, 40), torch.randint(40, (133,))
    whole = compare(reference, logits, targets)
    parts = compare(reference, logits, targets, sizes=[1, 65, 67])
    assert whole == parts
    assert whole.num_tokens == 133


def test_equal_logits_do_not_diverge():
    logits = torch.randn(7, 33)
    logits[:, 5] = -torch.inf  # a word that cannot follow
    result = compare(logits, logits, torch.zeros(7, dtype=torch.int64))
    assert result.kld_mean == result.kld_p999 == 0.0
    assert result.top1_agreement == 1.0
    assert result.ppl_change == 0.0


def test_the_mean_is_known_on_the_way():
    comparison = LogitComparison()
    assert comparison.kld_mean is None
    comparison.add(torch.randn(3, 8), torch.randn(3, 8), torch.zeros(3, dtype=torch.int64))
    assert comparison.kld_mean == pytest.approx(comparison.result().kld_mean)
    assert comparison.kld_mean > 0


def test_wrong_shapes_are_refused():
    comparison = LogitComparison()
    with pytest.raises(ShapeError, match=r"\[3, 8\] and \[3, 9\]"):
        comparison.add(torch.randn(3, 8), torch.randn(3, 9), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="no position"):
        comparison.result()


def test_needles_differ_and_repeat_their_answer():
    needles = make_needles(MAX_NEEDLES)
    assert len({needle.question for needle in needles}) == MAX_NEEDLES
    assert all(needle.question + needle.answer in needle.sentence for needle in needles)
    assert needles == make_needles(MAX_NEEDLES)
    assert [needle.answer for needle in needles] != [needle.answer for needle in make_needles(MAX_NEEDLES, seed=1)]
    with pytest.raises(ConfigError, match=f"0 to {MAX_NEEDLES}"):
        make_needles(MAX_NEEDLES + 1)


def test_needles_are_hidden_at_equal_distances():
    text = torch.arange(100)
    hidden = hide_needles(text, [torch.tensor([-1]), torch.tensor([-2, -2])])
    assert hidden.tolist() == [*range(25), -1, *range(25, 75), -2, -2, *range(75, 100)]
    assert hide_needles(text, []) is text


def test_an_answer_is_found_token_by_token():
    answer_ids = torch.tensor([2, 0])
    logits = torch.tensor([[0.0, 0.0, 3.0], [3.0, 0.0, 0.0]])
    answer = score_answer(logits, answer_ids)
    assert answer.is_found
    assert answer.log_probability == pytest.approx(2 * (3 - math.log(2 + math.exp(3))), rel=1e-6)
    assert not score_answer(logits, torch.tensor([2, 1])).is_found


def test_answers_are_paired():
    reference = [Answer(True, -1.0), Answer(True, -1.0), Answer(False, -5.0)]
    result = pair_answers(reference, [Answer(True, -1.5), Answer(False, -3.0), Answer(True, -0.5)])
    assert (result.num_needles, result.num_reference_found, result.num_found) == (3, 2, 2)
    assert (result.num_lost, result.num_gained) == (1, 1)
    assert result.log_probability_change == pytest.approx((-0.5 - 2.0 + 4.5) / 3)
    with pytest.raises(ShapeError):
        pair_answers(reference, [])
