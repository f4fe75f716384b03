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

from moe_bitnet.checkpoint.manifest import MANIFEST_NAME, verify_manifest, write_manifest
from moe_bitnet.checkpoint.pack import model_layout, packed_skeleton, require_local_experts
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.files import read_json, recover_directory, replace_directory
from moe_bitnet.model import MoETransformer
from moe_bitnet.packed_module import arrange_weights
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
        float_dtype: if given, float matrices are rounded to it (``torch.float16`` for a twin that is
            to be deployed); norms and routers stay as they are.
    Raises:
        CheckpointError: the folder holds files that are no checkpoint, or the model's experts are elsewhere.
        OSError: the disk is full or the place cannot be written; what was there stays.
    """
    folder = Path(folder)
    recover_directory(folder)
    if folder.exists() and not (folder / MANIFEST_NAME).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: holds something that is no checkpoint; it was left alone. Give another folder."
        )
    with replace_directory(folder) as new_folder:
        write_model(model, new_folder, float_dtype)
        write_manifest(new_folder)


def write_model(model: MoETransformer, folder: Path, float_dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing folder, without a manifest."""
    require_local_experts(model)
    header = config_header(model.config, model_layout(model))
    (folder / CONFIG_NAME).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    tensors = {name: _stored(name, tensor, float_dtype) for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, str(folder / TENSORS_NAME))


def config_header(config: ModelConfig, layout: Layout | None) -> dict[str, Any]:
    """Return what ``config.json`` holds."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "layout": layout, "model": config.to_dict()}


def load_model(folder: Path | str) -> MoETransformer:
    """Read a checkpoint, verified.

    Returns:
        the model in evaluation mode; half-precision weights stay in half precision.
    Raises:
        CheckpointError: missing, truncated, altered, or tensors that do not fit the config.
    """
    folder = Path(folder)
    if (folder / "state.json").is_file() and not (folder / TENSORS_NAME).exists():
        raise CheckpointError(
            f"{folder}: is a checkpoint of a training run, with the optimizer's state, in parts. Run "
            f"`moe-bitnet export {folder} OUT` and give OUT."
        )
    verify_manifest(folder, required=(CONFIG_NAME, TENSORS_NAME))
    info = read_info(folder)
    with torch.device("meta"):
        model = MoETransformer(info.config)
    if info.layout is not None:
        packed_skeleton(model, info.layout)
    tensors = read_tensors(folder / TENSORS_NAME)
    _check_tensors(tensors, model.state_dict(), folder)
    _check_bytes(tensors, info, folder)
    model.load_state_dict(tensors, assign=True)
    del tensors  # so that arranging releases the portable bytes module by module
    arrange_weights(model)
    return model.eval()


def read_info(folder: Path) -> CheckpointInfo:
    """Read what a checkpoint is, without its weights.

    Raises:
        CheckpointError: ``config.json`` is missing, damaged, or of another format or version.
    """
    path = folder / CONFIG_NAME
    try:
        header: Any = read_json(path)
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
        config = ModelConfig.from_dict(header.get("model"), source="model")
        layout = None if header.get("layout") is None else check_layout(str(header["layout"]))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if layout is not None and not config.is_packable:
        raise CheckpointError(
            f"{path}: layout {layout!r} contradicts precision {config.precision!r}. The file is damaged."
        )
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


def is_matrix(name: str) -> bool:
    """Tell by its name whether a tensor of a model's state is a float matrix that half precision may hold."""
    return name.endswith(
        ("_proj.weight", "embedding.weight", "lm_head.weight", "gate_weight", "up_weight", "down_weight")
    )


def is_routed_expert(name: str) -> bool:
    """Tell by its name whether a tensor of a model's state holds all routed experts of a layer."""
    return ".moe.experts." in name


def _stored(name: str, tensor: Tensor, float_dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if float_dtype is not None and is_matrix(name):
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
            is_shared = ".shared_experts." in name
            width = config.shared_intermediate_size if is_shared else config.intermediate_size
            check_packed(tensor, width, info.layout, f"{folder}: {name}")
        elif name.endswith("o_proj.weight_packed"):
            check_packed(tensor, config.num_heads * config.head_dim, info.layout, f"{folder}: {name}")
        elif name.endswith("_packed"):
            check_packed(tensor, config.hidden_size, info.layout, f"{folder}: {name}")
