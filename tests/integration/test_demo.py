"""The main job at its smallest, through Ray Train, DeepSpeed and expert hosts."""

import json

import pytest

from moe_bitnet.cli.main import main

TEXT = "def add(first, second):\n    return first + second\n\n"


@pytest.mark.ray
def test_the_demo_walks_all_steps(tmp_path, capsys):
    for index in range(12):
        text = "".join(TEXT.replace("add", f"add_{index}_{line}") for line in range(60))
        (tmp_path / f"text_{index}.py").write_text(text)
    texts = [str(path) for path in sorted(tmp_path.glob("*.py"))]
    run = tmp_path / "run"
    sizes = ["--device-memory", "110kB", "--memory", "100kB"]
    assert main(["demo", "--run", str(run), "--size", "tiny", "--no-compile", "--json", *sizes, "--data", *texts]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == []
    generated = json.loads((run / "generate.json").read_text())
    twin, ternary, spread = generated["runs"]
    assert generated["tokens_equal_single_process"]
    assert (spread["dispatch"], spread["combine"]) == ("int8", twin["combine"])
    assert ternary["bytes_per_token"] == 0 < min(spread["bytes_per_token"], twin["bytes_per_token"])
    for precision in ("ternary", "float"):
        lines = [json.loads(line) for line in (run / precision / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 20
        assert losses[-1] < losses[0]
        assert list((run / precision / "tensorboard").glob("events.out.tfevents.*"))
    context = json.loads((run / "context.json").read_text())
    assert [entry["format"] for entry in context["formats"]] == ["fp16", "8-bit", "4-bit", "2-bit"]
    assert (run / "report" / "report.html").read_text().count("<svg") >= 6
