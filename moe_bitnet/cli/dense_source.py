"""A dense checkpoint on this machine, read with transformers: settings, tensors and tokenizer.

A folder as transformers saves it, or a GGUF file that it can read. Nothing is downloaded and no code of the
checkpoint is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_bitnet.checkpoint.upcycle_source import dense_config
from moe_bitnet.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class DenseSource:
    """What a dense checkpoint holds.

    Attributes:
        settings: of ``config.json``.
        tensors: by their names in the source.
        tokenizer: as transformers has it.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Any

    def token_ids(self, text: str) -> list[int]:
        """Return the tokens of ``text`` without special ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def tokenizer_json(self) -> str | None:
        """Return the tokenizer in the layout of the ``tokenizers`` library, if it has one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str(pretty=True))


def read_dense_source(path: Path) -> DenseSource:
    """Read a checkpoint whole, once its settings are known to be LLaMA-like.

    Args:
        path: a folder with ``config.json``, or a GGUF file, or a folder with one.
    Raises:
        ConfigError: transformers is missing, or the model is not LLaMA-like.
        CheckpointError: nothing is there, or transformers cannot read it.
    """
    folder, gguf_file = _locate(path)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(f"upcycle needs transformers ({error}). Run pip install 'moe-bitnet[hf]'.") from error
    disable_progress_bar()
    options = {"local_files_only": True, **({"gguf_file": gguf_file} if gguf_file else {})}
    try:
        settings = AutoConfig.from_pretrained(folder, **options).to_dict()
        dense_config(settings, str(path))  # before gigabytes are read
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except ConfigError:  # ours, which is a ValueError too
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded by transformers ({error}). Give another checkpoint.") from error
    return DenseSource(settings, model.state_dict(), tokenizer)


def _locate(path: Path) -> tuple[Path, str | None]:
    """Return the folder, and the name of the GGUF file in it if that is what was meant."""
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder and no GGUF file. Give a checkpoint of transformers.")
    found = sorted(file.name for file in path.glob("*.gguf"))
    if (path / "config.json").is_file() or not found:
        return path, None
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GGUF files ({', '.join(found)}). Name one of them.")
    return path, found[0]
