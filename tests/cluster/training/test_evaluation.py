import numpy as np
import pytest
import torch

from cluster.training.engine import TorchEngine
from cluster.training.evaluation import Evaluation, evaluate
from cluster.training.objective import Objective
from cluster.training.run import evaluation_batches
from moe_bitnet.model import MoETransformer


@pytest.fixture
def engine(model_config, config):
    torch.manual_seed(0)
    return TorchEngine(MoETransformer(model_config), config)


@pytest.fixture
def batches(model_config):
    tokens = np.random.default_rng(0).integers(model_config.vocab_size, size=(5, 17))
    sizes = [(0, 2), (2, 4), (4, 5)]  # the last batch is smaller, and counts less
    return [(tokens[start:end, :-1].copy(), tokens[start:end, 1:].copy()) for start, end in sizes]


def test_loss_is_the_mean_over_tokens(engine, batches):
    inputs, targets = (torch.from_numpy(np.concatenate(part)) for part in zip(*batches, strict=True))
    with torch.no_grad():
        output = engine.model(inputs)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1).double(), targets.flatten())
    evaluation = evaluate(engine, Objective(1.0, 1.0), batches)
    assert evaluation.loss == pytest.approx(expected.item(), rel=1e-6)
    load = output.tokens_per_expert / output.tokens_per_expert.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(evaluation.expert_load), load)


def test_workers_share_the_batches(engine, batches):
    alone = evaluate(engine, Objective(0.0, 0.0), batches)
    sums = []
    engine.world_size = 2
    for engine.rank in (0, 1):  # what each would send
        sent = []
        engine.sum_over_workers = lambda values, sent=sent: sent.append(values) or torch.ones_like(values)
        evaluate(engine, Objective(0.0, 0.0), batches)
        sums.append(sent)
    total = sums[0][0] + sums[1][0]
    assert (total[0] / total[1]).item() == pytest.approx(alone.loss, rel=1e-12)
    visits = sums[0][1] + sums[1][1]
    torch.testing.assert_close(visits / visits.sum(1, keepdim=True), torch.tensor(alone.expert_load).double())


def test_every_worker_scores_as_many_batches(engine, batches):
    # those without one in the last round: others may need their experts
    engine.world_size, counts = 2, []
    engine.sum_over_workers = torch.ones_like
    for engine.rank in (0, 1):
        scored = []
        engine.predict = lambda tokens, scored=scored: scored.append(tokens) or TorchEngine.predict(engine, tokens)
        evaluate(engine, Objective(0.0, 0.0), batches)
        counts.append(len(scored))
    assert counts == [2, 2]


def test_evaluation_batches_have_the_training_shape(config):
    tokens = np.arange(16 * 11 + 1, dtype=np.int32)  # 11 windows
    shapes = [inputs.shape for inputs, _ in evaluation_batches(tokens, config.replace(num_eval_batches=9), 1)]
    assert shapes == [(4, 16), (4, 16)]
    assert len(list(evaluation_batches(tokens, config.replace(num_eval_batches=1), 2))) == 2
    few = tokens[: 16 * 3 + 1]
    assert [inputs.shape for inputs, _ in evaluation_batches(few, config, 1)] == [(3, 16)]


def test_units():
    evaluation = Evaluation(np.log(2.0) * 6, ((1.0,),))
    assert evaluation.perplexity == pytest.approx(64)
    assert evaluation.bits_per_byte(3.0) == pytest.approx(2)
