import dataclasses
import pickle

import pytest

from cluster.config import ClusterConfig
from cluster.transport.row_format import Combine
from moe_bitnet.errors import ConfigError


def test_defaults_start_a_local_ray_and_change_nothing_but_the_order_of_a_sum():
    config = ClusterConfig()
    assert config.address is None
    assert (config.dispatch, config.has_dedup, config.returned) == ("int8", True, Combine("partial_sums", "float32"))
    assert config.bulk_min_bytes is None  # everything is encrypted


@pytest.mark.parametrize(
    "changes",
    [
        {"address": ""},
        {"address": "  "},
        {"address": 6379},
        {"num_cpus": 0},
        {"num_cpus": 1.5},
        {"num_cpus": True},
        {"address": "10.0.0.1:6379", "num_cpus": 2},
        {"connect_timeout_s": 0},
        {"connect_timeout_s": float("inf")},
        {"connect_timeout_s": 10**6 + 1},
        {"request_timeout_s": -1.0},
        {"request_timeout_s": float("nan")},
        {"request_timeout_s": "30"},
        {"retry_after_s": 0.0},
        {"retry_after_s": True},
        {"heartbeat_s": 0},
        {"heartbeat_s": None},
        {"bulk_min_bytes": 0},
        {"bulk_min_bytes": 1.5},
        {"bulk_min_bytes": True},
        {"dispatch": "fp16"},
        {"has_dedup": "yes"},
        {"has_dedup": None},
        {"combine": "float32"},
        {"combine_format": "rows"},
    ],
    ids=str,
)
def test_impossible_settings_are_named(changes):
    with pytest.raises(ConfigError, match=list(changes)[-1]):
        ClusterConfig(**changes)


@pytest.mark.parametrize("row_format", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
def test_only_float32_rows_are_exact(mode, row_format):
    config = ClusterConfig(combine=mode, combine_format=row_format)
    assert config.returned == Combine(mode, row_format)
    assert config.returned.is_exact == (mode == "rows" and row_format == "float32")


@pytest.mark.parametrize("values", [("sums", "float32"), ("rows", "float64")])
def test_a_combine_that_does_not_exist_is_named(values):
    with pytest.raises(ConfigError, match=values[0] if values[0] == "sums" else values[1]):
        Combine(*values)


def test_config_is_frozen_and_survives_pickling():
    config = ClusterConfig(address="10.0.0.1:6379", request_timeout_s=5, dispatch="bfloat16", combine="rows")
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dispatch = "int8"
