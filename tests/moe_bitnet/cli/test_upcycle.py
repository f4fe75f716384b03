import json

import pytest
import torch
from llama_factory import tiny_llama

from cluster.training.config import TrainConfig
from cluster.training.run import build_torch_engine, run_training
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.cli.data import build_data
from moe_bitnet.cli.main import main
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory, text_folder):
    """A random LLaMA with a tokenizer of this project's kind, as transformers saves them."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("source")
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]
    tokenizer = Tokenizer.train(texts, 320)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._inner).save_pretrained(folder)
    tiny_llama(vocab_size=tokenizer.vocab_size, head_dim=16).save_pretrained(folder)
    return folder


def upcycle(*arguments):
    return main(["upcycle", *(str(argument) for argument in arguments)])


def fails(capsys, *arguments):
    assert upcycle(*arguments) == 2
    return " ".join(capsys.readouterr().err.split()).partition("error: ")[2]


@torch.no_grad()
def test_a_mote_checkpoint_predicts_what_the_source_does(source, text_folder, tmp_path, capsys):
    out = tmp_path / "mote"
    options = ("--experts", 3, "--top-k", 2, "--expert-width", 8, "--text", text_folder, "--tokens", 300)
    assert upcycle(source, out, *options, "--json") == 0
    captured = capsys.readouterr()
    assert f"moe-bitnet train --initial-model {out}" in captured.err
    result = json.loads(captured.out)
    model = load_model(out)
    assert (model.config.num_experts, model.config.top_k, model.config.intermediate_size) == (3, 2, 8)
    assert result["model"] == model.config.to_dict()
    assert result["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    # of tiny matrices, scales and norms included
    assert result["expert_bytes_2bit"] < result["expert_bytes_float16"] / 3
    from transformers import LlamaForCausalLM

    token_ids = torch.arange(40)[None]
    expected = LlamaForCausalLM.from_pretrained(source)(token_ids).logits
    assert torch.allclose(model(token_ids).logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_text_is_tokenized_by_the_saved_tokenizer(source, text_folder, tmp_path):
    out = tmp_path / "ternary"
    assert upcycle(source, out, "--recipe", "ternary", "--experts", 2, "--text", text_folder) == 0
    model = load_model(out)  # the tokenizer beside it is part of the checkpoint
    assert model.config.precision == "ternary"
    assert not model.config.has_float_backbone
    run_folder = RunFolder(tmp_path / "run")
    summary = build_data(run_folder, [text_folder], vocab_size=4096, tokenizer_file=out / "tokenizer.json")
    assert summary["vocab_size"] == model.config.vocab_size
    assert run_folder.load_tokenizer().to_json() == Tokenizer.load(out / "tokenizer.json").to_json()


def test_training_goes_on_from_an_upcycled_checkpoint(source, text_folder, tmp_path, capsys):
    start, run_folder = tmp_path / "start", RunFolder(tmp_path / "run")
    assert upcycle(source, start, "--experts", 3, "--top-k", 2, "--text", text_folder) == 0
    build_data(run_folder, [text_folder], vocab_size=4096, tokenizer_file=start / "tokenizer.json")
    before = load_model(start)
    config = TrainConfig(
        run_folder.data,
        run_folder.training("ternary"),
        num_steps=3,
        batch_size=2,
        seq_len=32,
        peak_learning_rate=1e-2,
        initial_model=start,
        has_frozen_backbone=True,
        is_compiled=False,
    )
    summary = run_training(before.config, config, build_torch_engine(config), torch.device("cpu"))
    assert summary is not None
    trained, start_state = load_model(run_folder.model("ternary")).state_dict(), before.state_dict()
    changed = {name for name in trained if not torch.equal(trained[name], start_state[name])}
    assert changed == {name for name in trained if ".moe.experts." in name or ".moe.router." in name}

    run = ("--run", str(run_folder.path), "--json")
    capsys.readouterr()
    assert main(["pack", "--layout", "2bit", *run]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_logit_difference"] == 0
    packed = str(run_folder.packed("2bit"))
    assert main(["inspect", packed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "2bit"
    assert main(["generate", "--model", packed, "--max-new-tokens", "3", *run]) == 0
    assert json.loads(capsys.readouterr().out)["num_new_tokens"] == 3
    assert main(["generate", "--model", packed, "--head", "int8", *run]) == 2
    assert "not packed throughout" in " ".join(capsys.readouterr().err.split())


def test_the_same_seed_gives_the_same_model(source, text_folder, tmp_path):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        assert upcycle(source, tmp_path / name, "--text", text_folder, "--tokens", 2, "--seed", seed) == 0
    one, again, other = (load_model(tmp_path / name).state_dict() for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["blocks.0.moe.router.weight"], other["blocks.0.moe.router.weight"])


def test_a_tokenizer_of_another_kind_is_left_out_with_a_remark(source, text_folder, tmp_path, capsys):
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in source.iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    values = json.loads((altered / "tokenizer.json").read_text())
    (altered / "tokenizer.json").write_text(json.dumps(values | {"normalizer": {"type": "Lowercase"}}))
    assert upcycle(altered, tmp_path / "out", "--text", text_folder) == 0
    captured = capsys.readouterr()
    assert "tokenizer is not saved" in captured.err
    assert "tokenizer: None" in captured.out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_no_source_is_named(source, tmp_path, capsys):
    assert "is no folder and no GGUF file" in fails(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "cannot be loaded by transformers" in fails(capsys, tmp_path, tmp_path / "out")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"no model")
    assert "2 GGUF files (a.gguf, b.gguf)" in fails(capsys, tmp_path, tmp_path / "out")
    assert "cannot be loaded by transformers" in fails(capsys, tmp_path / "a.gguf", tmp_path / "out")


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    assert "model_type is 'gpt2'; supported are llama" in fails(capsys, tmp_path, tmp_path / "out")


def test_impossible_options_are_named(source, tmp_path, capsys):
    assert "--tokens is 1" in fails(capsys, source, tmp_path / "out", "--tokens", 1)
    assert "top_k 5" in fails(capsys, source, tmp_path / "out", "--top-k", 5)
    assert "expert_width 41" in fails(capsys, source, tmp_path / "out", "--expert-width", 41)
    assert not (tmp_path / "out").exists()
