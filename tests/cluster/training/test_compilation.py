import logging

import pytest
import torch

from cluster.training.compilation import compile_blocks, compile_obstacle
from cluster.training.run import build_torch_engine, run_training
from moe_bitnet.model import MoETransformer


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in compile_obstacle("cpu")
    assert "C compiler" in compile_obstacle("cuda")


def test_a_missing_header_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "Python.h" in compile_obstacle("cpu")


def test_float32_experts_are_not_compiled():
    assert "bfloat16" in compile_obstacle("cpu", "float32")


def test_without_a_compiler_training_runs_eager_and_says_so(model_config, config, monkeypatch, caplog):
    monkeypatch.setattr("cluster.training.compilation.compile_obstacle", lambda *args: "no compiler, for a test")
    config = config.replace(is_compiled=True, num_steps=3)
    with caplog.at_level(logging.WARNING):
        summary = run_training(model_config, config, build_torch_engine(config), torch.device("cpu"))
    assert summary["is_compiled"] is False
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "no compiler, for a test" in caplog.text


@pytest.mark.slow
def test_compiled_training_follows_eager_training(model_config, config):
    reason = compile_obstacle("cpu")
    if reason:
        pytest.skip(reason)
    model_config = model_config.replace(precision="float")
    config = config.replace(compute_dtype="bfloat16")
    eager = run_training(model_config, config, build_torch_engine(config), torch.device("cpu"))
    config = config.replace(is_compiled=True, out_folder=config.out_folder / "compiled")
    compiled = run_training(model_config, config, build_torch_engine(config), torch.device("cpu"))
    assert compiled["is_compiled"] is True
    assert compiled["validation_loss"] == pytest.approx(eager["validation_loss"], abs=1e-2)


def test_zero_3_runs_eager_and_says_so(model_config, monkeypatch, caplog):
    monkeypatch.setattr("cluster.training.compilation.compile_obstacle", lambda *args: None)
    with caplog.at_level(logging.WARNING):
        assert not compile_blocks(MoETransformer(model_config), "bfloat16", zero_stage=3)
        assert "ZeRO 3" in caplog.text
        assert compile_blocks(MoETransformer(model_config), "bfloat16", zero_stage=2)
