"""Whole runs of several processes with DeepSpeed: stopped, and gone on with as others."""

import json

import pytest
import torch
from training_workers import run_workers

from cluster.training.checkpointing import latest_checkpoint
from cluster.training.run import run_training
from cluster.training.stopping import request_stop
from moe_bitnet.checkpoint.native import load_model

NUM_STEPS = 6


def train_in_group(rank, world_size, folder, model_config, settings):
    """Train one run after the other; each is (TrainConfig, steps after which to stop or None)."""
    from cluster.training.deepspeed_engine import DeepSpeedEngine

    for config, stop_after in settings:

        class Engine(DeepSpeedEngine):
            num_forwards = 0

            def forward(self, token_ids, stop_after=stop_after, out_folder=config.out_folder):
                self.num_forwards += 1
                if self.num_forwards == stop_after and self.rank == 0:
                    request_stop(out_folder)
                return super().forward(token_ids)

        if rank == 0:
            (config.out_folder / "stop-requested").unlink(missing_ok=True)
        torch.distributed.barrier()
        run_training(
            model_config,
            config,
            lambda model, is_compiled, config=config, kind=Engine: kind(model, config, is_compiled),
            torch.device("cpu"),
            rank,
            world_size,
        )


def losses_of(config):
    lines = [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1))
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("division", [{"expert_parallel": 2, "zero_stage": 1}, {"zero_stage": 3}])
def test_a_divided_run_goes_on_with_the_same_workers_and_with_others(model_config, config, tmp_path, division):
    """With the same workers to the bit; with one, and with four that divide the experts otherwise, but for rounding."""
    model_config = model_config.replace(precision="float", num_experts=5)  # 3 and 2 of them on two workers
    config = config.replace(num_workers=2, exchange_dtype="float32", **division)
    names = ("whole", "stopped", "one", "four")
    whole, stopped, one, four = (config.replace(out_folder=tmp_path / name) for name in names)
    one = one.replace(num_workers=1, expert_parallel=1, zero_stage=0)
    four = four.replace(num_workers=4, expert_parallel=4 if config.expert_parallel > 1 else 1, zero_stage=1)
    runs = [(whole, None), (stopped, 3), (stopped, None)]
    runs += [(config.replace(out_folder=each.out_folder), 3) for each in (one, four)]
    run_workers(train_in_group, 2, tmp_path / "two", model_config, runs)
    assert losses_of(stopped) == losses_of(whole)
    expected, found = (load_model(each.out_folder / "model").state_dict() for each in (whole, stopped))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for each, world_size in ((one, 1), (four, 4)):
        assert len(list(latest_checkpoint(each.out_folder).glob("shard-*-of-00002.safetensors"))) == 2
        run_workers(train_in_group, world_size, tmp_path / str(world_size), model_config, [(each, None)])
        assert losses_of(each) == pytest.approx(losses_of(whole), abs=1e-5)
        found = load_model(each.out_folder / "model").state_dict()
        assert found.keys() == expected.keys()
