import dataclasses
import pickle

import pytest

from cluster.config import ClusterConfig
from moe_bitnet.errors import ConfigError


def test_defaults_start_a_local_ray_with_exact_formats() -> None:
    config = ClusterConfig()
    assert config.address is None
    assert (config.dispatch, config.combine) == ("int8", "float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"address": ""},
        {"address": 6379},
        {"num_cpus": 0},
        {"num_cpus": 1.5},
        {"num_cpus": True},
        {"address": "10.0.0.1:6379", "num_cpus": 2},
        {"connect_timeout_s": 0},
        {"connect_timeout_s": float("inf")},
        {"request_timeout_s": -1.0},
        {"request_timeout_s": float("nan")},
        {"request_timeout_s": "30"},
        {"dispatch": "bfloat16"},
        {"combine": "int8"},
    ],
)
def test_impossible_settings_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=list(changes)[-1]):
        ClusterConfig(**changes)  # type: ignore[arg-type]


def test_config_is_frozen_and_survives_pickling() -> None:
    config = ClusterConfig(address="10.0.0.1:6379", request_timeout_s=5, dispatch="float16", combine="float16")
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dispatch = "int8"  # type: ignore[misc]
