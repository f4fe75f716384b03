import json

import pytest

from moe_bitnet.cli.main import main

pytest.importorskip("transformers", reason="transformers is not installed (pip install moe-bitnet[hf])")

TEXT = "Lighthouses send out light at night. Sailors know each of them by its colour and rhythm. " * 20


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model of two layers and a tokenizer of single bytes, as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "text.txt", tmp_path / "other.txt"]
    for path, text in zip(paths, (TEXT, TEXT.swapcase()), strict=True):
        path.write_text(text)
    return paths


def command(model_folder, text, *more):
    options = ["--model", model_folder, "--text", text, "--tokens", 500, "--skip", 256, "--needles", 1, *more]
    return [str(part) for part in ("kv-eval", *options)]


def fails(capsys, arguments):
    assert main(arguments) == 2
    return " ".join(capsys.readouterr().err.split()).partition("error: ")[2]


def test_formats_are_compared(model_folder, texts, capsys):
    text, other = texts
    more = ["--formats", "K16V16,K8V8,K2V2", "--calibrate", other, "--calibrate-tokens", 300, "--json"]
    assert main(command(model_folder, text, *more)) == 0
    result = json.loads(capsys.readouterr().out)
    exact, wide, narrow = result["formats"]
    assert [entry["format"] for entry in result["formats"]] == ["K16V16", "K8V8", "K2V2"]
    assert exact["kld_mean"] == pytest.approx(0, abs=1e-9)
    assert 0 < wide["kld_mean"] < narrow["kld_mean"]
    assert exact["top1_agreement"] == 1.0
    assert narrow["effective_bits"] == 2.25
    assert narrow["num_tokens"] == 500 - 1 - 250  # no more than half is skipped
    assert narrow["needles"]["num_needles"] == 1
    assert result["calibration"] == str(other)


def test_a_table_is_printed(model_folder, texts, capsys):
    assert main(command(model_folder, texts[0], "--formats", "K4V4", "--needles", 0)) == 0
    captured = capsys.readouterr()
    assert "K4V4" in captured.out
    assert "KLD mean" in captured.out
    assert "reading 100 %" in captured.err


def test_mistakes_are_told(model_folder, texts, tmp_path, capsys):
    text, other = texts
    assert "K3V4" in fails(capsys, command(model_folder, text, "--formats", "K3V4"))
    assert "is the text itself" in fails(capsys, command(model_folder, text, "--calibrate", text))
    assert "no folder" in fails(capsys, command(tmp_path / "none", text))
    assert "cannot be loaded" in fails(capsys, command(tmp_path, text))
    assert "cannot be read" in fails(capsys, command(model_folder, tmp_path / "none.txt"))
    assert "made for 2048" in fails(capsys, command(model_folder, text, "--tokens", 4000))
    assert "chunk_len is 48" in fails(capsys, command(model_folder, text, "--chunk", 48))
    assert "--tokens is 1" in fails(capsys, command(model_folder, text, "--tokens", 1))
    other.write_text("")
    assert "is empty" in fails(capsys, command(model_folder, other))
