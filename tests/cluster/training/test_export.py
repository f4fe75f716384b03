import json

import pytest
import torch
from worker_threads import run_workers

from cluster.training.export import export_checkpoint
from moe_bitnet.checkpoint.native import load_model, read_info
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.cli.main import main
from moe_bitnet.errors import CheckpointError


@pytest.fixture
def trained(model_config, config):
    """The folder of a run of two workers."""
    assert run_workers(model_config, config.replace(num_workers=2))[0]["num_steps"] == 6
    return config.out_folder


def assert_same_logits(model, expected):
    token_ids = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)


def test_the_exported_model_is_the_trained_one(trained, tmp_path):
    source = export_checkpoint(trained, tmp_path / "model")
    assert source == trained / "checkpoints" / "step_000006"
    model, expected = load_model(tmp_path / "model"), load_model(trained / "model")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert "tokenizer.json" in manifest["files"]


@pytest.mark.parametrize("layout", ["2bit", "base3"])
def test_a_packed_export_is_the_trained_model_packed(trained, tmp_path, layout):
    export_checkpoint(trained / "checkpoints" / "step_000006", tmp_path / "packed", layout)
    assert read_info(tmp_path / "packed").layout == layout
    assert_same_logits(load_model(tmp_path / "packed"), pack_model(load_model(trained / "model"), layout))


def test_the_best_checkpoint_is_found(trained, tmp_path):
    assert export_checkpoint(trained, tmp_path / "model", is_best=True).name == "step_000006"


def test_the_command_exports(trained, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path / "model"), "--layout", "2bit", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"].endswith("step_000006")
    assert_same_logits(load_model(result["model"]), pack_model(load_model(trained / "model"), "2bit"))


def test_what_is_no_training_checkpoint_is_refused(trained, tmp_path):
    for folder in (trained / "model", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
            export_checkpoint(folder, tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="left alone"):
        export_checkpoint(trained, tmp_path / "thesis")
