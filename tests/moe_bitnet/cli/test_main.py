import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.cli.main import main
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.model import MoETransformer

DEVICES = ["--devices", "6", "--device-memory", "110kB", "--no-start"]


@pytest.fixture
def run(filled_run, tmp_path):
    return RunFolder(shutil.copytree(filled_run.path, tmp_path / "run"))


def fails(capsys, *arguments):
    """Run the command line, check that it failed as it should, and return its one sentence."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = " ".join(captured.err.split())
    assert "Traceback" not in message
    assert "error: " in message
    return message.partition("error: ")[2]


def succeeds(capsys, *arguments):
    """Run the command line with --json and return what it printed."""
    assert main([*(str(argument) for argument in arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_steps_after_training_work_one_by_one(run, capsys):
    packed = succeeds(capsys, "pack", "--run", run.path)
    assert [entry["layout"] for entry in packed["layouts"]] == ["2bit", "base3"]
    assert packed["max_abs_logit_difference"] <= 1e-6 * packed["max_abs_logit"]
    place = succeeds(capsys, "place", "--run", run.path, *DEVICES)
    assert place["float16"]["num_devices"] > place["ternary"]["num_devices"] == 1
    context = succeeds(capsys, "context", "--run", run.path, "--memory", "100kB")
    tokens = [entry["num_tokens"] for entry in context["formats"]]
    assert tokens == sorted(tokens)
    assert all(entry["allocated_bytes"] <= 100_000 for entry in context["formats"])
    text = succeeds(capsys, "generate", "--run", run.path, "--model", run.packed("2bit"), "--max-new-tokens", 5)
    assert text["num_new_tokens"] == 5
    inspected = succeeds(capsys, "inspect", run.packed("base3"))
    assert inspected["layout"] == "base3"
    assert 0.2 < inspected["share_of_zero_weights"] < 0.4
    report = succeeds(capsys, "report", "--run", run.path)
    assert {entry["section"] for entry in report["missing"]} == {"ternary", "twin", "generate", "machine"}
    assert (run.path / "report" / "report.html").is_file()


def test_data_takes_parquet(tmp_path, capsys):
    texts = [f"document {index} " + "some words to learn from " * 40 for index in range(30)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    out = tmp_path / "run"
    summary = succeeds(capsys, "data", "--run", out, "--data", tmp_path / "texts.parquet", "--vocab-size", "300")
    assert summary["num_train_documents"] + summary["num_validation_documents"] == 30
    assert summary["num_validation_tokens"] > 0


def test_data_that_cannot_be_read_is_an_error_and_keeps_what_was_there(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "truncated.parquet").write_bytes(b"PAR1 and no more")
    before = (run.data / "summary.json").read_bytes()
    for name in ("missing.txt", "empty.txt", "binary.bin", "truncated.parquet"):
        assert name in fails(capsys, "data", "--run", run.path, "--data", tmp_path / name)
    assert (run.data / "summary.json").read_bytes() == before


def test_a_config_with_impossible_sizes_is_an_error(run, tmp_path, capsys):
    config = tmp_path / "model.json"
    sizes = '"hidden_size": 0, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1'
    config.write_text('{"vocab_size": 512, ' + sizes + "}")
    message = fails(capsys, "train", "--run", run.path, "--config", config)
    assert "hidden_size" in message
    assert "model.json" in message
    config.write_text("{not json")
    assert "model.json" in fails(capsys, "train", "--run", run.path, "--config", config)


def test_a_model_that_is_not_ternary_is_not_packed(run, capsys):
    assert "ternary" in fails(capsys, "pack", "--run", run.path, "--model", run.model("float"))
    assert not run.packed("2bit").exists()


def test_a_packed_model_is_not_packed_again(run, capsys):
    succeeds(capsys, "pack", "--run", run.path, "--layout", "2bit")
    assert "packed already" in fails(capsys, "pack", "--run", run.path, "--model", run.packed("2bit"))


def test_a_truncated_or_altered_checkpoint_is_an_error(run, capsys):
    tensors = run.model("ternary") / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-100])
    assert "truncated" in fails(capsys, "pack", "--run", run.path)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "altered" in fails(capsys, "pack", "--run", run.path)
    assert not run.packed("2bit").exists()


def test_devices_too_small_for_one_expert_are_an_error(run, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    message = fails(capsys, "place", "--run", run.path, "--devices", 4, "--device-memory", "900B", "--no-start")
    assert "900 B" in message
    assert not run.json_file("place").exists()


def test_a_twin_that_needs_more_devices_than_given_does_not_stop_the_ternary_model(run, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    place = succeeds(capsys, "place", "--run", run.path, "--devices", 1, "--device-memory", "110kB", "--no-start")
    assert place["ternary"]["num_devices"] == 1 < place["float16"]["num_devices"]


def test_a_twin_of_another_shape_is_refused(run, tmp_path, capsys):
    config = PRESETS["tiny"].model_config(600, "ternary")
    save_model(MoETransformer(config), tmp_path / "other")
    assert "shapes differ" in fails(capsys, "pack", "--run", run.path, "--model", tmp_path / "other")
    assert not run.packed("2bit").exists()


@pytest.mark.parametrize(
    "option",
    [("data", "--max-mb=nan"), ("data", "--max-mb=inf"), ("generate", "--seed=-1"), ("train", f"--seed={2**70}")],
)
def test_option_values_out_of_range_are_named(option, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(list(option))
    assert exit_.value.code == 2
    assert option[1].partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--temperature", "nan"), ("--temperature", "inf"), ("--max-new-tokens", 10**14)])
def test_impossible_generation_is_an_error(run, wrong, capsys):
    fails(capsys, "generate", "--run", run.path, "--model", run.model("ternary"), *wrong)


def test_generating_before_placing_names_the_step(run, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    assert "moe-bitnet place" in fails(capsys, "generate", "--run", run.path)


def test_too_few_devices_are_an_error(run, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    fails(capsys, "place", "--run", run.path, "--devices", 1, "--device-memory", "50kB", "--no-start")


def test_a_placement_of_ones_own_is_used(run, tmp_path, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"device_names": ["device-3", "device-0"], "devices_of_expert": [[0, 1] * 4, [1] * 8]}))
    place = succeeds(capsys, "place", "--run", run.path, *DEVICES, "--placement", own)
    assert place["ternary"]["num_devices"] == 2
    own.write_text(json.dumps({"device_names": ["device-3"], "devices_of_expert": [[0] * 8]}))
    assert "own.json" in fails(capsys, "place", "--run", run.path, *DEVICES, "--placement", own)


def test_a_ray_address_that_does_not_answer_is_an_error(run, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    place = ("place", "--run", run.path, "--devices", "6", "--device-memory", "110kB")
    assert "127.0.0.1:9" in fails(capsys, *place, "--address", "127.0.0.1:9")


def test_a_step_without_its_predecessor_names_it(tmp_path, capsys):
    run = tmp_path / "new"
    assert "moe-bitnet train" in fails(capsys, "pack", "--run", run)
    assert "moe-bitnet pack" in fails(capsys, "place", "--run", run)
    assert "moe-bitnet pack" in fails(capsys, "context", "--run", run)
    fails(capsys, "train", "--run", run)
    fails(capsys, "generate", "--run", run)
    fails(capsys, "report", "--run", run)


def test_a_cache_larger_than_the_text_is_an_error(run, capsys):
    succeeds(capsys, "pack", "--run", run.path)
    assert "smaller --memory" in fails(capsys, "context", "--run", run.path, "--memory", "1GB")


@pytest.mark.parametrize("size", ["many", "-1GB", "1e9"])
def test_a_memory_size_that_is_none_is_an_error(run, size, capsys):
    assert "memory size" in fails(capsys, "context", "--run", run.path, f"--memory={size}")


def test_ctrl_c_is_no_traceback(run, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_bitnet.cli.pack.pack_model", interrupted)
    assert main(["pack", "--run", str(run.path)]) == 130
    assert "run the same command" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_is_no_traceback_and_loses_nothing(run, capsys, monkeypatch):
    succeeds(capsys, "pack", "--run", run.path)
    before = (run.packed("2bit") / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_bitnet.checkpoint.native.write_manifest", full)
    assert "No space left" in fails(capsys, "pack", "--run", run.path)
    assert (run.packed("2bit") / "model.safetensors").read_bytes() == before
