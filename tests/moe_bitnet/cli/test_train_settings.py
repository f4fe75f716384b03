import argparse
import tomllib
from pathlib import Path

import pytest

from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.cli import train
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.run_folder import DEFAULT_RUN
from moe_bitnet.cli.train_settings import settings_of
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.model import MoETransformer

SHAPE = "hidden_size = 32\nintermediate_size = 48\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\n"


def settings(*options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    train.add_arguments(parser)
    return settings_of(parser.parse_args([str(option) for option in options]))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "train.toml"
        path.write_text(text)
        return path

    return write


def test_without_a_file_the_preset_decides():
    found = settings("--size", "tiny", "--precision", "float")
    preset = PRESETS["tiny"]
    assert found.model == {**preset.shape, "max_seq_len": preset.seq_len, "precision": "float"}
    config = found.train_config
    assert (config.num_steps, config.warmup_steps) == (preset.num_steps, preset.warmup_steps)
    assert config.peak_learning_rate == preset.peak_learning_rates["float"]
    assert config.out_folder == DEFAULT_RUN / "float"
    assert config.data_folder == DEFAULT_RUN / "data"


def test_the_file_changes_the_preset_and_options_change_the_file(write):
    path = write(
        '[model]\npreset = "tiny"\nnum_experts = 4\nprecision = "binary"\n'
        '[train]\nnum_steps = 90\nseed = 3\nout_folder = "there"\nexpert_parallel = 2\nnum_workers = 2\n'
    )
    found = settings(path, "--seed", 5, "--no-compile")
    config = found.train_config
    assert found.model["num_experts"] == 4
    assert found.model["hidden_size"] == PRESETS["tiny"].shape["hidden_size"]
    assert found.model["precision"] == "binary"
    assert (config.num_steps, config.seed, config.is_compiled, config.stage) == (90, 5, False, 1)
    assert config.warmup_steps == 9, "a share of the steps, once their number is not the preset's"
    assert str(config.out_folder) == "there"
    assert config.data_folder == DEFAULT_RUN / "data"


def test_run_overrides_the_folders_of_the_file(write, tmp_path):
    path = write('[train]\nout_folder = "there"\ndata_folder = "elsewhere"\n')
    config = settings(path, "--run", tmp_path, "--precision", "float").train_config
    assert (config.data_folder, config.out_folder) == (tmp_path / "data", tmp_path / "float")


def test_a_file_with_a_whole_shape_needs_no_preset(write):
    found = settings(write(f"[model]\n{SHAPE}[train]\nseq_len = 33\nbatch_size = 3\n"))
    assert "num_experts" not in found.model
    assert found.model["max_seq_len"] == 33
    assert found.train_config.num_steps == 1000
    assert found.train_config.peak_learning_rate is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nhiden_size = 3\n", ["hiden_size", "[model]", "hidden_size"]),
        ("[model]\nvocab_size = 3\n", ["vocab_size", "[model]"]),
        ("[train]\nsteps = 3\n", ["steps", "[train]", "num_steps"]),
        ("[training]\nsteps = 3\n", ["training", "[model], [train]"]),
        ("seed = 3\n", ["seed", "[model], [train]"]),
        ("model = 3\n", ["model is 3", "[model]"]),
        ('[model]\npreset = "huge"\n', ["huge", "tiny, demo, small"]),
        ("[train\n", ["is not TOML"]),
        ("[train]\nnum_steps = 0\n", ["num_steps is 0"]),
        ("[train]\nout_folder = 7\n", ["out_folder is 7"]),
        ('[train]\nnum_steps = "many"\n', ["num_steps is 'many'"]),
        ("[train]\nexpert_parallel = 2\n", ["expert_parallel 2", "num_workers 1"]),
    ],
)
def test_what_a_file_may_not_hold_is_named(write, text, words):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        settings(path)
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml.*--write-config"):
        settings(tmp_path / "no.toml")


def test_a_shape_with_sizes_missing_names_file_and_size(write, filled_run):
    path = write("[model]\nhidden_size = 32\n")
    with pytest.raises(ConfigError, match=r"train\.toml.*intermediate_size"):
        settings(path, "--run", filled_run.path).model_config()


def test_the_vocabulary_is_that_of_the_data(filled_run, tmp_path):
    config = settings("--size", "tiny", "--run", filled_run.path).model_config()
    assert config == PRESETS["tiny"].model_config(filled_run.load_tokenizer().vocab_size, "ternary")
    with pytest.raises(DataError, match="moe-bitnet data"):
        settings("--run", tmp_path / "new").model_config()


def test_an_initial_model_gives_the_shape(tmp_path):
    model = MoETransformer(PRESETS["tiny"].model_config(300, "float"))
    save_model(model, tmp_path / "initial")
    found = settings("--initial-model", tmp_path / "initial", "--seq-len", 32)
    assert ModelConfig(**found.model) == model.config
    assert settings("--initial-model", tmp_path / "initial", "--size", "demo").model["hidden_size"] == 192


@pytest.mark.parametrize("options", [[], ["--size", "tiny", "--num-workers", 2, "--precision", "int4-experts"]])
def test_what_write_config_prints_is_read_back_as_the_same_settings(options, write, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", action="store_true")
    train.add_arguments(parser)
    train.run(parser.parse_args([*map(str, options), "--write-config"]))
    text = capsys.readouterr().out
    assert set(tomllib.loads(text)) == {"model", "train"}
    read, written = settings(write(text)), settings(*options)
    assert read.train_config == written.train_config
    assert ModelConfig(vocab_size=9, **read.model) == ModelConfig(vocab_size=9, **written.model)
    for name in ("hidden_size", "exchange_dtype", "max_loss_rise"):
        before = text[: text.index(f"\n{name} =")].splitlines()[-1]
        assert before.startswith("# "), f"{name} has no explanation"
