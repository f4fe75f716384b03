import json

import pytest
import torch

from cluster.training.checkpointing import latest_checkpoint
from cluster.training.engine import TorchEngine
from cluster.training.run import run_training
from moe_bitnet.errors import TrainingError

CPU = torch.device("cpu")


def lines_of(config):
    return [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]


class CountedEngine(TorchEngine):
    """Claims to have sent some bytes in each pass."""

    num_bytes = 0

    def forward(self, token_ids):
        self.num_bytes += 10
        return super().forward(token_ids)

    def backward(self, loss):
        self.num_bytes += 5
        super().backward(loss)

    def predict(self, token_ids):
        self.num_bytes += 1000
        return super().predict(token_ids)

    def take_dispatch_bytes(self):
        taken, self.num_bytes = self.num_bytes, 0
        return taken


def test_the_bytes_of_evaluations_are_no_steps(model_config, config):
    run_training(model_config, config, lambda model, is_compiled: CountedEngine(model, config, is_compiled), CPU)
    counts = [line["dispatch_bytes"] for line in lines_of(config) if "loss" in line]
    assert counts == [10, 15, 15, 15, 15, 15], "each forward pass, and the backward pass before it"


class LeapingEngine(TorchEngine):
    """Its update number ``at`` makes the head useless, as a much too large step would."""

    num_steps = 0

    def __init__(self, at, *arguments):
        super().__init__(*arguments)
        self.at = at

    def step(self):
        norm = super().step()
        self.num_steps += 1
        if self.num_steps == self.at:
            self.model.norm.weight.data.mul_(-100.0)
        return norm


@pytest.mark.parametrize("at", [5, 9])
def test_a_spike_stops_with_its_step_and_keeps_the_checkpoint_from_before(model_config, config, at):
    config = config.replace(num_steps=30, eval_every_steps=30, checkpoint_every_s=1e-9, num_kept_checkpoints=3)
    with pytest.raises(TrainingError, match=rf"step {at + 1}: the loss rose to .* above .* median"):
        run_training(
            model_config, config, lambda model, is_compiled: LeapingEngine(at, model, config, is_compiled), CPU
        )
    assert [line["step"] for line in lines_of(config)] == list(range(1, at + 1))
    assert int(latest_checkpoint(config.out_folder).name.removeprefix("step_")) < at
