import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from cluster.training.checkpoint_folder import write_part
from cluster.training.checkpointing import latest_checkpoint
from cluster.training.engine import TorchEngine
from cluster.training.run import build_torch_engine, run_training
from cluster.training.stopping import request_stop
from moe_bitnet.checkpoint.native import load_model, save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.errors import CheckpointError, ConfigError, DataError, TrainingError
from moe_bitnet.model import MoETransformer

CPU = torch.device("cpu")


def run(model_config, config, build=None):
    return run_training(model_config, config, build or build_torch_engine(config), CPU)


def lines_of(config):
    return [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]


class DisturbedEngine(TorchEngine):
    """Calls ``disturb(engine, output, step)`` after each forward pass in training; steps count from 1."""

    def __init__(self, disturb, config, model, is_compiled):
        super().__init__(model, config, is_compiled)
        self.disturb = disturb
        self.num_forwards = 0

    def forward(self, token_ids):
        self.num_forwards += 1
        output = super().forward(token_ids)
        self.disturb(self, output, self.num_forwards)
        return output


def disturbed(disturb, config):
    return partial(DisturbedEngine, disturb, config)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_repetitive_text_is_learned(model_config, config, precision, compute_dtype):
    config = config.replace(num_steps=120, eval_every_steps=60, compute_dtype=compute_dtype, warmup_steps=5)
    summary = run(model_config.replace(precision=precision), config)
    lines = lines_of(config)
    first, evaluations = lines[0], [line for line in lines if "validation_loss" in line]
    assert abs(first["loss"] - math.log(model_config.vocab_size)) < 0.5
    assert summary["validation_loss"] < 0.6 * first["loss"]
    assert evaluations[-1]["validation_loss"] == summary["validation_loss"] < evaluations[0]["validation_loss"]
    assert [line["step"] for line in evaluations] == [60, 120]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 121))


def test_the_summary_and_the_model_agree(model_config, config, data_folder):
    summary = run(model_config, config)
    assert json.loads((config.out_folder / "summary.json").read_text()) == summary
    model = load_model(config.out_folder / "model")
    manifest = json.loads((config.out_folder / "model" / "manifest.json").read_text())
    assert "tokenizer.json" in manifest["files"]
    assert summary["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    experts = [value.numel() for name, value in model.named_parameters() if "experts." in name]
    assert summary["num_expert_parameters"] == sum(experts)
    # of 4 routed experts in 2 layers, a token leaves out 2
    assert summary["num_active_parameters"] == summary["num_parameters"] - 2 * 2 * model_config.expert_parameters
    assert summary["num_tokens"] == 6 * 4 * 16
    assert summary["validation_ppl"] == pytest.approx(math.exp(summary["validation_loss"]))
    assert summary["peak_learning_rate"] == 8e-3
    assert summary["is_compiled"] is False
    assert summary["config"] == model_config.to_dict()
    for layer in summary["expert_load"]:
        assert len(layer) == 4
        assert sum(layer) == pytest.approx(1)


def test_resuming_is_exact_to_the_bit(model_config, config, precision, tmp_path):
    model_config = model_config.replace(precision=precision)
    whole = config.replace(out_folder=tmp_path / "whole")
    summary = run(model_config, whole)

    def stop_in_third(engine, output, step):
        if step == 3:
            request_stop(config.out_folder)

    assert run(model_config, config, disturbed(stop_in_third, config)) is None
    assert latest_checkpoint(config.out_folder).name == "step_000003"
    (config.out_folder / "stop-requested").unlink()
    resumed = run(model_config, config)
    expected, found = (load_model(folder / "model").state_dict() for folder in (whole.out_folder, config.out_folder))
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert resumed["validation_loss"] == summary["validation_loss"]
    assert resumed["expert_load"] == summary["expert_load"]
    steps = [line["step"] for line in lines_of(config) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    losses = [[line["loss"] for line in lines_of(each) if "loss" in line] for each in (whole, config)]
    assert losses[0] == losses[1]


def test_a_signal_stops_with_a_checkpoint(model_config, config):
    def interrupt(engine, output, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert run(model_config, config, disturbed(interrupt, config)) is None
    assert signal.getsignal(signal.SIGTERM) is before
    assert latest_checkpoint(config.out_folder).name == "step_000002"


def test_a_finished_run_gives_its_summary_again(model_config, config):
    summary = run(model_config, config)
    lines = lines_of(config)
    assert run(model_config, config) == summary
    assert lines_of(config) == lines


def test_a_loss_that_is_not_finite_stops_with_its_step(model_config, config, immediate_writes):
    def poison(engine, output, step):
        if step == 4:
            output.logits.data.fill_(math.nan)

    config = config.replace(checkpoint_every_s=1e-9)
    with pytest.raises(TrainingError, match="step 4"):
        run(model_config, config, disturbed(poison, config))
    assert latest_checkpoint(config.out_folder).name == "step_000003"
    assert run(model_config, config)["num_steps"] == 6


def test_parameters_that_are_not_finite_are_never_saved(model_config, config, immediate_writes):
    def poison(engine, output, step):
        if step == 3:  # the loss of this step is fine, its gradient is not
            engine.model.norm.weight.data[0] = math.inf

    config = config.replace(checkpoint_every_s=1e-9, eval_every_steps=100)
    with pytest.raises(TrainingError, match=r"step 3: .* is not finite"):
        run(model_config, config, disturbed(poison, config))
    # that of step 1 is completed in step 2, and one is under way at a time
    assert latest_checkpoint(config.out_folder).name == "step_000001"


def test_optimizer_state_that_is_not_finite_is_never_saved(model_config, config, immediate_writes):
    def poison(engine, output, step):
        if step == 3:
            engine.optimizer.state[engine.model.norm.weight]["exp_avg"][0] = math.nan

    config = config.replace(checkpoint_every_s=1e-9, eval_every_steps=100)
    with pytest.raises(TrainingError, match=r"step 3: .* norm\.weight\S* is not finite"):
        run(model_config, config, disturbed(poison, config))
    assert latest_checkpoint(config.out_folder).name == "step_000001"


def test_a_checkpoint_that_the_next_loss_proves_bad_goes(model_config, config, immediate_writes):
    """The one after step 3 is under way when the loss of step 4 jumps: what came before stays."""

    def poison(engine, output, step):
        if step == 4:
            output.logits.data.mul_(1e4)

    config = config.replace(checkpoint_every_s=1e-9)
    with pytest.raises(TrainingError, match="step 4: the loss rose"):
        run(model_config, config, disturbed(poison, config))
    folder = latest_checkpoint(config.out_folder)
    assert folder.name == "step_000001"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert run(model_config, config)["num_steps"] == 6


def test_an_older_checkpoint_under_way_is_completed_when_the_loss_jumps(model_config, config, monkeypatch):
    is_late = threading.Event()
    monkeypatch.setattr(
        "cluster.training.checkpoint_writer.write_part", lambda *part: is_late.wait(20) and write_part(*part)
    )

    def poison(engine, output, step):
        if step == 4:
            is_late.set()
            output.logits.data.mul_(1e4)

    config = config.replace(checkpoint_every_s=1e-9)
    with pytest.raises(TrainingError, match="step 4: the loss rose"):
        run(model_config, config, disturbed(poison, config))
    assert latest_checkpoint(config.out_folder).name == "step_000001"


def test_spikes_after_a_resume_are_judged_by_the_losses_before(model_config, config):
    config = config.replace(num_steps=8, max_loss_rise=0.5, eval_every_steps=100)

    def stop_in_sixth(engine, output, step):
        if step == 6:
            request_stop(config.out_folder)

    def poison(engine, output, step):  # the first step after the resume
        output.logits.data.mul_(1e4)

    assert run(model_config, config, disturbed(stop_in_sixth, config)) is None
    (config.out_folder / "stop-requested").unlink()
    with pytest.raises(TrainingError, match="median of the last 6 steps"):
        run(model_config, config, disturbed(poison, config))


def test_a_run_starts_from_an_initial_model(model_config, config, tmp_path):
    torch.manual_seed(7)
    initial = MoETransformer(model_config)
    save_model(initial, tmp_path / "initial")
    seen = []

    def look(engine, output, step):
        if step == 1:
            seen.append({name: tensor.clone() for name, tensor in engine.model.state_dict().items()})

    config = config.replace(initial_model=tmp_path / "initial")
    run(model_config, config, disturbed(look, config))
    for name, tensor in initial.state_dict().items():
        assert torch.equal(seen[0][name], tensor)
    shutil.rmtree(tmp_path / "initial")
    assert run(model_config, config)["num_steps"] == 6  # a resumed run does not need it


def test_an_initial_model_that_does_not_fit_is_refused(model_config, config, tmp_path):
    model = MoETransformer(model_config)
    save_model(model, tmp_path / "initial")
    save_model(pack_model(model, "2bit"), tmp_path / "packed")
    with pytest.raises(ConfigError, match="top_k was 2, now 1"):
        run(model_config.replace(top_k=1), config.replace(initial_model=tmp_path / "initial"))
    with pytest.raises(ConfigError, match="packed weights cannot be trained"):
        run(model_config, config.replace(initial_model=tmp_path / "packed"))
    with pytest.raises(CheckpointError, match="nowhere"):
        run(model_config, config.replace(initial_model=tmp_path / "nowhere"))


def test_more_expert_parallel_workers_than_experts_are_refused(model_config, config):
    with pytest.raises(ConfigError, match="Give at most 4"):
        run(model_config, config.replace(num_workers=8, batch_size=8, expert_parallel=8, zero_stage=1))


def test_what_does_not_fit_is_refused_before_training(model_config, config, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size"):
        run(model_config.replace(vocab_size=999), config)
    with pytest.raises(ConfigError, match="max_seq_len"):
        run(model_config.replace(max_seq_len=8), config)
    with pytest.raises(DataError):
        run(model_config, config.replace(data_folder=tmp_path / "nowhere"))


def test_another_model_in_the_same_folder_is_refused(model_config, config):
    run(model_config, config)
    with pytest.raises(CheckpointError, match="precision was 'ternary', now 'float'"):
        run(model_config.replace(precision="float"), config)


def test_the_loop_needs_neither_ray_nor_deepspeed():
    code = "import sys, cluster.training.run; sys.exit('ray' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
