import json

import pytest

from benchmarks.machine import (
    Machine,
    amd_generation,
    describe_machine,
    last_level_cache_bytes,
    parse_cache_size,
    parse_cpuinfo,
)


def machine(**changes):
    fields = {
        "cpu": "AMD EPYC", "vendor": "amd", "family": 26, "model": 2, "num_cores": 2,
        "flags": ("avx2", "avx512f", "avx512_vnni"), "last_level_cache_bytes": 32 * 2**20, "memory_bytes": 24 * 10**9,
    }  # fmt: skip
    return Machine(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({}, "amd-epyc-zen5-2-cores"),
        ({"cpu": "AMD Ryzen 9 7950X", "family": 25, "model": 0x61, "num_cores": 32}, "amd-ryzen-zen4-32-cores"),
        (
            {"cpu": "Intel(R) Xeon(R) Processor", "vendor": "intel", "family": 6, "flags": ("avx512f", "amx_int8")},
            "intel-xeon-amx-2-cores",
        ),
        (
            {"cpu": "Intel(R) Core(TM) i7", "vendor": "intel", "family": 6, "flags": ("avx2",)},
            "intel-core-avx2-2-cores",
        ),
        ({"cpu": "", "vendor": "aarch64", "family": -1, "flags": ()}, "aarch64-2-cores"),
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_the_slug_says_what_decides_the_speed(changes, slug):
    assert machine(**changes).slug == slug


@pytest.mark.parametrize(
    ("family", "model", "generation"),
    [(23, 0x01, "zen"), (23, 0x31, "zen2"), (25, 0x01, "zen3"), (25, 0x11, "zen4"), (26, 2, "zen5"), (6, 1, "")],
)
def test_generations_of_amd(family, model, generation):
    assert amd_generation(family, model) == generation


def test_cpuinfo_of_the_first_processor():
    text = "processor\t: 0\nmodel name\t: A: B\n\nprocessor\t: 1\nmodel name\t: C\n"
    assert parse_cpuinfo(text) == {"processor": "0", "model name": "A: B"}
    assert parse_cpuinfo("") == {}


@pytest.mark.parametrize(("text", "size"), [("32768K\n", 2**25), ("32M", 2**25), ("7", 7), ("", 0), ("many", 0)])
def test_cache_sizes(text, size):
    assert parse_cache_size(text) == size


def test_the_last_level_is_the_largest(tmp_path):
    for index, size in enumerate(["48K", "1024K", "32768K"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20
    assert last_level_cache_bytes(tmp_path / "absent") is None


def test_this_machine_fits_into_a_line():
    described = describe_machine().to_dict()
    assert json.loads(json.dumps(described)) == described
    assert described["num_cores"] >= 1
    assert described["memory_bytes"] > 0
