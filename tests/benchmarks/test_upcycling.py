import dataclasses
import random

import pytest
import torch
from llama_factory import tiny_llama

from benchmarks.metrics import Metric
from benchmarks.upcycling_plot import plot_upcycling
from benchmarks.upcycling_run import Course, evaluated_steps, make_text, measure, rounded, train_on
from cluster.training.document import Document
from cluster.training.shards import split_documents
from moe_bitnet.checkpoint.upcycle import UpcycleSettings, upcycle
from moe_bitnet.checkpoint.upcycle_source import dense_model
from moe_bitnet.checkpoint.upcycle_statistics import collect_statistics
from moe_bitnet.errors import DataError
from moe_bitnet.tokenizer import Tokenizer

COURSE = Course(
    num_steps=6, batch_size=4, seq_len=8, peak_learning_rate=1e-2, num_points=2, max_s=60.0, has_frozen_backbone=True
)


def documents(seed):
    generator = random.Random(seed)
    return [Document(f"{seed}-{index}", "".join(generator.choices("abc de", k=150))) for index in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train((document.text for document in documents(0)), 270)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return {name: make_text(documents(seed), tokenizer, 8, 5) for seed, name in enumerate(("one", "other"))}


@pytest.fixture
def dense(tokenizer):
    llama = tiny_llama(vocab_size=tokenizer.vocab_size)
    return dense_model(llama.config.to_dict(), llama.state_dict(), "tiny")


def upcycled(dense, texts, recipe="mote"):
    rows = torch.from_numpy(texts["one"].train[:64]).long().view(-1, 8)
    return upcycle(dense, UpcycleSettings(recipe, 3, 2), collect_statistics(dense, rows))


def test_validation_text_is_not_trained_on(tokenizer, texts):
    train, validation = split_documents(documents(0))
    assert tokenizer.decode(texts["one"].train) == "".join(document.text for document in train)
    assert list(texts["one"].train).count(tokenizer.end_of_text_id) == len(train)
    held_out = "".join(document.text for document in validation)
    assert texts["one"].validation.shape == (5, 9)
    for window in texts["one"].validation:
        assert tokenizer.decode(window) in held_out


def test_rounding_leaves_three_values_in_each_projection_and_nothing_else_changes(dense):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    after = rounded(dense).state_dict()
    for name, tensor in after.items():
        if "_proj." in name or ("shared" in name and "weight" in name):
            assert len(tensor.unique()) == 3
        else:
            assert torch.equal(tensor, before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_a_frozen_backbone_stays_while_experts_learn(dense, texts):
    model = upcycled(dense, texts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start, points = measure(model, texts), []
    train_on(model, texts, COURSE, points.append)
    assert [(point.step, point.num_tokens) for point in points] == [(3, 96), (6, 192)]
    assert all(point.perplexities[text] < start[text] for text in texts for point in points)
    assert all(1 <= point.largest_load <= 3 for point in points)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".moe.experts." in name or ".moe.router." in name}


@pytest.mark.slow
def test_without_a_frozen_backbone_everything_learns(dense, texts):
    model = upcycled(dense, texts, "ternary")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_on(model, texts, dataclasses.replace(COURSE, has_frozen_backbone=False), lambda point: None)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_training_ends_when_its_time_is_over(dense, texts):
    points = []
    last = train_on(upcycled(dense, texts), texts, dataclasses.replace(COURSE, max_s=0.0), points.append)
    assert [point.step for point in points] == [1]
    assert last == points[0]


@pytest.mark.parametrize(("num_steps", "num_points"), [(1, 1), (7, 3), (100, 5), (2, 5)])
def test_the_last_step_is_always_evaluated(num_steps, num_points):
    steps = evaluated_steps(dataclasses.replace(COURSE, num_steps=num_steps, num_points=num_points))
    assert num_steps in steps
    assert len(steps - {0}) == min(num_steps, num_points)


def test_a_drawing_needs_perplexities(tmp_path):
    def point(model, text, tokens, value):
        detail = {"model": model, "text": text, "tokens": tokens, "source": "tiny"}
        return Metric("upcycling.ppl", value, "PPL", detail=detail)

    metrics = [
        point(model, text, tokens, 9.0 + tokens)
        for model, text, tokens in (
            ("dense", "code", 0), ("rounded", "code", 0), ("mote", "code", 0), ("mote", "code", 5), ("mote", "prose", 0)
        )
    ]  # fmt: skip
    plot_upcycling([*metrics, point("ternary", "prose", 0, None)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(DataError, match="none of 1 metrics is a perplexity"):
        plot_upcycling([Metric("upcycling.stored_bytes", 1.0, "bytes")], tmp_path / "other.png")
