"""A small trained model for tests that need one; ``benchmarks/real_model.py`` says how to get it."""

from functools import cache
from typing import Any

import pytest

from benchmarks.real_model import find_model_folder, load_model_and_tokenizer
from moe_bitnet.errors import ConfigError


def real_model() -> Any:
    """Return ``(model, tokenizer)`` in float32, the same objects in every call; skip the test where it is missing."""
    pytest.importorskip("transformers", reason="transformers is not installed (pip install moe-bitnet[hf])")
    pytest.importorskip("gguf", reason="gguf is not installed (pip install moe-bitnet[peers])")
    try:
        find_model_folder()
    except ConfigError as error:
        pytest.skip(f"no trained model: {error}")
    return _load()


@cache
def _load() -> Any:
    return load_model_and_tokenizer()
