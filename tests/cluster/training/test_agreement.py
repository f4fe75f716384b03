import pytest
from worker_threads import ThreadGroup

from cluster.training.agreement import first_answers, share_texts, tell_all
from moe_bitnet.errors import CheckpointError


@pytest.mark.parametrize("world_size", [1, 3])
def test_worker_0_tells_all(world_size):
    told = ThreadGroup(world_size).run(lambda engine: tell_all(engine, [engine.rank + 0.5, 2.0**40 - 1]))
    assert told == [[0.5, 2.0**40 - 1]] * world_size


def test_texts_are_shared_by_rank():
    texts = ["", "pas d'espace é👍", "x" * 5000]
    shared = ThreadGroup(3).run(lambda engine: share_texts(engine, texts[engine.rank]))
    assert shared == [[*texts[:2], "x" * 1000]] * 3


@pytest.mark.parametrize("answer", [None, 0, 1_000_000])
def test_worker_0_is_asked_alone(answer):
    asked = []

    def question():
        asked.append(answer)
        return answer

    assert ThreadGroup(3).run(lambda engine: first_answers(engine, question)) == [answer] * 3
    assert asked == [answer]


def test_an_error_of_worker_0_is_raised_by_all():
    def question():
        raise CheckpointError("all 3 checkpoints are damaged")

    for error in ThreadGroup(2).run(lambda engine: first_answers(engine, question)):
        assert isinstance(error, CheckpointError)
        assert str(error) == "all 3 checkpoints are damaged"
