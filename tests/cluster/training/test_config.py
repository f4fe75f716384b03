import json

import pytest

from cluster.training.config import TrainConfig
from moe_bitnet.errors import ConfigError


def test_json_round_trip(config, tmp_path):
    config.save(tmp_path / "train.json")
    assert TrainConfig.from_json(tmp_path / "train.json") == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_follow_precision_and_length():
    config = TrainConfig("data", "out", num_steps=100)
    assert config.peak_for("ternary") == 2 * config.peak_for("float") == 8e-3
    assert config.replace(peak_learning_rate=1e-3).peak_for("ternary") == 1e-3
    assert config.num_warmup_steps == 10
    assert TrainConfig("data", "out", num_steps=10_000).num_warmup_steps == 375
    assert TrainConfig("data", "out", num_steps=1).num_warmup_steps == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_folder", ""),
        ("out_folder", 3),
        ("num_steps", 0),
        ("num_steps", 1.5),
        ("batch_size", True),
        ("seq_len", -1),
        ("seed", -1),
        ("peak_learning_rate", 0.0),
        ("peak_learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("warmup_steps", 1000),
        ("adam_beta1", 1.0),
        ("weight_decay", -0.1),
        ("gradient_clipping", 0),
        ("gradient_clipping", float("inf")),
        ("load_balance_weight", "much"),
        ("compute_dtype", "float16"),
        ("num_workers", 3),
        ("threads_per_worker", 0),
        ("is_compiled", 1),
        ("num_kept_checkpoints", 0),
        ("checkpoint_every_s", 0),
    ],
)
def test_impossible_values_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{"data_folder": "data", "out_folder": "out", name: value})


@pytest.mark.parametrize("text", ["[]", "{", '{"data_folder": "a"}', '{"data_folder": "a", "out_folder": "b", "x": 1}'])
def test_wrong_files_are_named(text, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"train\.json"):
        TrainConfig.from_json(path)


@pytest.mark.parametrize("name", ["has_frozen_backbone", "has_activation_checkpointing"])
def test_what_zero_3_cannot_do_is_refused(config, name):
    with pytest.raises(ConfigError, match=f"{name} does not work with zero_stage 3"):
        config.replace(zero_stage=3, **{name: True})


def test_the_zero_stage_follows_expert_parallelism_unless_it_is_given(config):
    assert config.stage == 0
    shared = config.replace(num_workers=2, expert_parallel=2)
    assert shared.stage == 1
    assert TrainConfig.from_dict(shared.to_dict()).replace(expert_parallel=1).stage == 0
    for stage, reason in ((0, "drift apart"), (3, "no whole expert")):
        with pytest.raises(ConfigError, match=reason):
            shared.replace(zero_stage=stage)


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 2, "batch_size": 4, "gradient_accumulation_steps": 3},
        {"num_workers": 4, "batch_size": 4, "expert_parallel": 3},
        {"num_workers": 2, "batch_size": 4, "min_workers": 3},
        {"zero_stage": 4},
        {"exchange_dtype": "int8"},
    ],
)
def test_divisions_that_do_not_come_out_are_refused(config, change):
    with pytest.raises(
        ConfigError, match=r"gradient_accumulation|expert_parallel|min_workers|zero_stage|exchange_dtype"
    ):
        config.replace(**change)
