import json
import shutil

import pytest

from moe_bitnet.cli.main import main
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS


def planned(capsys, *arguments):
    """Plan with --json and return what was printed."""
    assert main(["context", "--json", *(str(argument) for argument in arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments):
    assert main(["context", *(str(argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


def test_the_plan_names_every_format_and_part(capsys):
    plan = planned(capsys, "--model", "mixtral-8x7b", "--memory", "24GB", "--weights-bits", "base3")
    assert [entry["format"] for entry in plan["formats"]] == list(CACHE_FORMATS)
    parts = ("weight_bytes", "workspace_bytes", "logit_bytes", "frame_bytes", "cache_budget_bytes")
    assert sum(plan[part] for part in parts) == plan["memory_bytes"] == 24 * 10**9
    assert plan["weight_bytes"] == KNOWN_SHAPES["mixtral-8x7b"].weight_bytes("base3")


def test_the_table_is_for_people(capsys):
    assert main(["context", "--model", "llama-3-8b", "--memory", "24GB", "--sequences", "2"]) == 0
    output = capsys.readouterr().out
    for text in (*CACHE_FORMATS, "weights, 16 bits", "sinks and windows of 2 sequences", "8,192 positions", "24 GB"):
        assert text in output


def test_a_hugging_face_folder_counts_its_files(tmp_path, capsys):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", **sizes, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from_shape = planned(capsys, "--model", tmp_path, "--memory", "1MB")
    assert from_shape["weight_bytes"] == 2 * from_shape["num_weights"]
    for index in range(2):
        (tmp_path / f"model-{index}.safetensors").write_bytes(b"x" * 50_000)
    for path in (tmp_path, tmp_path / "config.json"):
        assert planned(capsys, "--model", path, "--memory", "1MB")["weight_bytes"] == 100_000
    chosen = planned(capsys, "--model", tmp_path, "--memory", "1MB", "--weights-bits", "16")
    assert chosen["weight_bytes"] == from_shape["weight_bytes"]


def test_a_run_folder_and_a_checkpoint_have_their_real_size(filled_run, capsys):
    for path in (filled_run.path, filled_run.model("ternary")):
        plan = planned(capsys, "--model", path, "--memory", "2MB")
        assert plan["weight_bytes"] == (filled_run.model("ternary") / "model.safetensors").stat().st_size
        assert plan["shape"]["num_experts"] == 8


def test_what_cannot_be_planned_is_an_error(tmp_path, filled_run, capsys):
    assert "--memory is missing" in fails(capsys, "--model", "llama-3-8b")
    assert "neither a known name" in fails(capsys, "--model", tmp_path / "nothing", "--memory", "1GB")
    assert "weights take" in fails(capsys, "--model", "llama-3-8b", "--memory", "1GB")
    assert "--sequences is 0" in fails(capsys, "--model", "llama-3-8b", "--memory", "24GB", "--sequences", "0")
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "sliding_window": 4096}')
    assert "mistral is not supported" in fails(capsys, "--model", tmp_path, "--memory", "1GB")
    for damaged in ("[]", "{", "\xff"):
        (tmp_path / "config.json").write_text(damaged, encoding="latin-1")
        assert "config.json" in fails(capsys, "--model", tmp_path, "--memory", "1GB")


def test_without_a_model_caches_are_filled_with_text(filled_run, tmp_path, capsys):
    run = shutil.copytree(filled_run.path, tmp_path / "run")
    assert main(["pack", "--run", str(run)]) == 0
    capsys.readouterr()
    assert main(["context", "--run", str(run), "--memory", "100kB"]) == 0
    output = capsys.readouterr().out
    for text in ("fp16", "8-bit", "4-bit", "2-bit", "PPL"):
        assert text in output
    formats = json.loads((run / "context.json").read_text())["formats"]
    assert [entry["format"] for entry in formats] == ["fp16", "8-bit", "4-bit", "2-bit"]
    assert formats[3]["num_tokens"] > 2 * formats[0]["num_tokens"]
    assert formats[0]["ppl_common"] == pytest.approx(formats[1]["ppl_common"], rel=0.01)
