"""The checkpoint of this package: a folder with ``config.json``, ``model.safetensors`` and ``manifest.json``.

``config.json`` says what the tensors are::

    {"format": "moe-bitnet", "format_version": 1,
     "layout": null | "2bit" | "base3",        null: latent (ternary training) or float weights
     "model": {...ModelConfig...}}

Nothing in it is code: safetensors holds numbers alone, and every size is
checked against the config before a tensor is used.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from moe_bitnet.checkpoint.manifest import verify_manifest, write_manifest
from moe_bitnet.checkpoint.pack import model_layout, packed_skeleton
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.files import replace_directory
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import Layout, check_layout, check_packed

FORMAT = "moe-bitnet"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
TENSORS_NAME = "model.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, read from ``config.json`` alone.

    Attributes:
        config: the model's shape.
        layout: how ternary weights are packed, or ``None`` for latent and float weights.
    """

    config: ModelConfig
    layout: Layout | None


def save_model(model: MoETransformer, folder: Path | str, float_dtype: torch.dtype | None = None) -> None:
    """Write a model as a checkpoint; an older one in the same place is replaced whole or not at all.

    Args:
        model: latent, float or packed.
        folder: where to.
        float_dtype: if given, float weights with two or more dimensions are rounded to it
            (``torch.float16`` for a twin that is to be deployed); norms stay as they are.
    Raises:
        OSError: the disk is full or the place cannot be written; what was there stays.
    """
    with replace_directory(Path(folder)) as new_folder:
        write_model(model, new_folder, float_dtype)
        write_manifest(new_folder)


def write_model(model: MoETransformer, folder: Path, float_dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing folder, without a manifest."""
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": model_layout(model),
        "model": model.config.to_dict(),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    tensors = {name: _stored(tensor, float_dtype) for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, str(folder / TENSORS_NAME))


def load_model(folder: Path | str) -> MoETransformer:
    """Read a checkpoint, verified.

    Returns:
        the model in evaluation mode; half-precision weights stay in half precision.
    Raises:
        CheckpointError: missing, truncated, altered, or tensors that do not fit the config.
    """
    folder = Path(folder)
    verify_manifest(folder)
    info = read_info(folder)
    with torch.device("meta"):
        model = MoETransformer(info.config)
    if info.layout is not None:
        packed_skeleton(model, info.layout)
    tensors = read_tensors(folder / TENSORS_NAME)
    _check_tensors(tensors, model.state_dict(), folder)
    _check_bytes(tensors, info, folder)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_info(folder: Path) -> CheckpointInfo:
    """Read what a checkpoint is, without its weights.

    Raises:
        CheckpointError: ``config.json`` is missing, damaged, or of another format or version.
    """
    path = folder / CONFIG_NAME
    try:
        header: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Give a checkpoint folder of this package.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a {FORMAT} checkpoint. Give a folder written by save_model.")
    if header.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {header.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
            f"Install the release that wrote it."
        )
    try:
        config = ModelConfig.from_dict(header.get("model"), source=str(path))
        layout = None if header.get("layout") is None else check_layout(str(header["layout"]))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return CheckpointInfo(config, layout)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Copy it again, or save the model again.") from error
    return tensors


def _stored(tensor: Tensor, float_dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if float_dtype is not None and tensor.is_floating_point() and tensor.dim() > 1 and min(tensor.shape) > 1:
        tensor = tensor.to(float_dtype)
    return tensor.contiguous()


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: tensors do not fit the config; missing {missing[:3]}, unknown {unknown[:3]}. "
            f"The config and the weights belong to different models."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(
                f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)}, the config needs "
                f"{expected[name].dtype} {list(expected[name].shape)}. "
                f"The config and the weights belong to different models."
            )


def _check_bytes(tensors: dict[str, Tensor], info: CheckpointInfo, folder: Path) -> None:
    if info.layout is None:
        return
    config = info.config
    for name, tensor in tensors.items():
        if name.endswith("down_packed"):
            check_packed(tensor, config.intermediate_size, info.layout, f"{folder}: {name}")
        elif name.endswith("o_proj.weight_packed"):
            check_packed(tensor, config.num_heads * config.head_dim, info.layout, f"{folder}: {name}")
        elif name.endswith("_packed"):
            check_packed(tensor, config.hidden_size, info.layout, f"{folder}: {name}")
