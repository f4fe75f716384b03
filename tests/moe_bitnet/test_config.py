import dataclasses
import json

import pytest
from factories import tiny_config

from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError

COUNTS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "num_experts",
    "top_k", "max_seq_len",
]  # fmt: skip


@pytest.mark.parametrize("field", [*COUNTS, "num_shared_experts", "head_dim"])
@pytest.mark.parametrize("value", [-1, 1.0, 2.5, "3", None, True, [4]])
def test_an_impossible_count_names_its_field(field, value):
    with pytest.raises(ConfigError, match=rf"\b{field}\b"):
        tiny_config(**{field: value})


@pytest.mark.parametrize("field", COUNTS)
def test_zero_is_refused_where_something_is_needed(field):
    with pytest.raises(ConfigError, match=rf"\b{field} is 0; give an integer of at least 1"):
        tiny_config(**{field: 0})


@pytest.mark.parametrize("field", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_an_impossible_number_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field):
        tiny_config(**{field: value})


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(ConfigError, match="has_tied_embeddings"):
        tiny_config(has_tied_embeddings=value)


@pytest.mark.parametrize("field", ["precision", "norm_recipe", "activation"])
@pytest.mark.parametrize("value", ["", "other", None, 1, ["ternary"]])
def test_an_unknown_choice_names_its_field_and_the_allowed(field, value):
    with pytest.raises(ConfigError, match=rf"{field} is .*allowed are \w+, \w+"):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 10, "num_heads": 3, "num_kv_heads": 1, "head_dim": 0}, ["hidden_size 10", "num_heads 3"]),
        ({"hidden_size": 9, "num_heads": 3, "num_kv_heads": 1, "head_dim": 0}, ["head_dim is 3"]),
        ({"head_dim": 7}, ["head_dim is 7"]),
        ({"num_heads": 6, "num_kv_heads": 4}, ["num_heads 6", "num_kv_heads 4"]),
        ({"num_heads": 6, "num_kv_heads": 12}, ["num_heads 6", "num_kv_heads 12"]),
        ({"num_experts": 2, "top_k": 3}, ["top_k 3", "num_experts 2"]),
    ],
)
def test_sizes_that_contradict_each_other_are_both_named(changes, named):
    with pytest.raises(ConfigError) as caught:
        tiny_config(**changes)
    assert all(part in str(caught.value) for part in named)


def test_head_dim_follows_from_the_hidden_size():
    assert tiny_config(head_dim=0, num_heads=3, num_kv_heads=1).head_dim == 4
    assert tiny_config(head_dim=6).head_dim == 6


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().hidden_size = 3


def test_replace_checks_anew():
    config = tiny_config()
    assert config.replace(num_experts=7) == tiny_config(num_experts=7)
    with pytest.raises(ConfigError, match="top_k"):
        config.replace(num_experts=1)


def test_json_round_trip(tmp_path):
    config = tiny_config(norm_eps=1e-6, precision="float", has_tied_embeddings=False, num_shared_experts=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert ModelConfig.from_json(path) == config


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"here: unknown fields num_expert\. Allowed are .*num_experts"):
        ModelConfig.from_dict({**tiny_config().to_dict(), "num_expert": 3}, source="here")


def test_a_missing_field_is_named():
    values = tiny_config().to_dict()
    del values["num_layers"]
    with pytest.raises(ConfigError, match=r"here: .*num_layers"):
        ModelConfig.from_dict(values, source="here")


@pytest.mark.parametrize("values", [None, [], "text", 3, [["vocab_size", 3]]])
def test_only_an_object_is_a_config(values):
    with pytest.raises(ConfigError, match="here: expected a JSON object"):
        ModelConfig.from_dict(values, source="here")


def test_impossible_sizes_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**tiny_config().to_dict(), "top_k": 99}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"top_k 99") as caught:
        ModelConfig.from_json(path)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"no json", b"\xff\xfe", b'{"vocab_size": 1', b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
    ids=["empty", "brace", "text", "not utf-8", "truncated", "deeply nested", "5000 digits"],
)
def test_a_file_that_is_not_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        ModelConfig.from_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json"):
        ModelConfig.from_json(tmp_path / "absent.json")


def test_parameters_of_an_expert():
    assert tiny_config().expert_parameters == 3 * 12 * 7 + 7
