"""The shape of the house: public names, and who may import whom at run time."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PUBLIC_NAMES = {
    "moe_bitnet": {
        "BitLinear", "MoETransformer", "ModelConfig", "generate", "load_model", "pack_model", "save_model",
    },
    "kvcache": {"KVCacheConfig", "QuantizedKVCache"},
    "cluster": {"ClusterConfig", "connect", "solve_placement", "train"},
}  # fmt: skip

FILES_THAT_IMPORT_RAY = {
    "cluster/actors.py",
    "cluster/discovery.py",
    "cluster/page_tier.py",
    "cluster/expert_cluster.py",
    "cluster/host_fleet.py",
    "cluster/ray_metrics.py",
    "cluster/runtime.py",
    "cluster/shelf.py",
    "cluster/training/ray_elastic.py",
    "cluster/training/ray_failures.py",
    "cluster/training/ray_gauges.py",
    "cluster/training/ray_sweep.py",
    "cluster/training/ray_trainer.py",
    "cluster/training/ray_worker.py",
}

# `import ray`, `from ray.train import ...`, at any depth of indentation
IMPORTS_RAY = re.compile(r"^\s*(import\s+ray\b|from\s+ray\b)", re.MULTILINE)


@pytest.mark.parametrize("package", PUBLIC_NAMES)
def test_public_names_are_pinned(package):
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    assert set(module.__all__) == PUBLIC_NAMES[package]
    for name in module.__all__:
        assert callable(getattr(module, name))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("moe_bitnet", ["ray", "deepspeed", "triton", "kvcache", "cluster", "transformers"]),
        ("kvcache", ["ray", "deepspeed", "triton", "cluster", "transformers"]),
    ],
)
def test_importing_a_package_stays_light(package, forbidden):
    script = f"import sys, {package}; print(*sorted(set({forbidden!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == ""


def test_ray_is_imported_by_a_handful_of_files():
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PUBLIC_NAMES
        for path in (ROOT / package).rglob("*.py")
        if IMPORTS_RAY.search(path.read_text(encoding="utf-8"))
    }
    assert found <= FILES_THAT_IMPORT_RAY


def test_the_search_for_ray_finds_imports():
    for line in ("import ray", "    import ray.train", "from ray import train", "import ray as r"):
        assert IMPORTS_RAY.search(f"import os\n{line}\n")
    for line in ("import rays", "from array import array", "# import ray"):
        assert not IMPORTS_RAY.search(f"import os\n{line}\n")


@pytest.mark.parametrize("package", PUBLIC_NAMES)
def test_sources_are_importable_packages(package):
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders
    assert all((folder / "__init__.py").is_file() for folder in folders)
