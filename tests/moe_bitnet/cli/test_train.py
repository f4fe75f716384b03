import json

import pytest

from moe_bitnet.cli.main import main
from moe_bitnet.errors import ClusterError

SETTINGS = """
[model]
preset = "tiny"
num_experts = 4
[train]
num_steps = 3
eval_every_steps = 2
is_compiled = false
"""


@pytest.fixture
def command(filled_run, tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(f'{SETTINGS}data_folder = "{filled_run.data}"\nout_folder = "{tmp_path / "out"}"\n')
    return ["train", str(path), "--precision", "binary", "--json"]


@pytest.mark.ray
def test_a_run_from_a_file_leaves_a_model_and_a_report(command, tmp_path, capsys):
    assert main([*command, "--progress", "json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    out = tmp_path / "out"
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["precision"], summary["num_steps"], summary["config"]["num_experts"]) == ("binary", 3, 4)
    told = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    assert told == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 2, 2, 3, 3]
    for name in ("report.html", "curves.png", "settings.json", "attempts.jsonl", "model/model.safetensors"):
        assert (out / name).is_file()
    assert main(["report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_finished"]


def test_a_run_that_ends_early_leaves_a_report_of_what_there_is(command, tmp_path, capsys, monkeypatch):
    def train(model_config, config, *_, on_progress):
        assert on_progress is None, "nothing is shown in JSON mode"
        config.out_folder.mkdir()
        line = {"step": 1, "tokens": 1, "loss": 3.0, "load_balance_loss": 1.0, "router_z_loss": 1.0}
        line |= {"learning_rate": 0.1, "tokens_per_s": 9.0, "expert_load_cv": 0.1, "elapsed_s": 1.0}
        (config.out_folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        raise ClusterError("a worker died")

    monkeypatch.setattr("cluster.training.ray_trainer.train", train)
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: a worker died\n"
    assert "has not come to its end" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_fails_before_its_first_step_says_why(command, tmp_path, capsys):
    assert main([*command, "--run", str(tmp_path / "new")]) == 2
    assert "moe-bitnet data" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_settings_are_printed_instead_of_trained(capsys):
    assert main(["train", "--size", "tiny", "--steps", "9", "--write-config"]) == 0
    assert "num_steps = 9\n" in capsys.readouterr().out
