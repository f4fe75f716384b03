"""``moe-bitnet inspect``: what a checkpoint holds, verified, without running it."""

import argparse
from pathlib import Path
from typing import Any

import torch

from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.checkpoint.sizes import bits_per_expert_weight, folder_bytes
from moe_bitnet.packing import unpack

HELP = "verify a checkpoint and say what it holds: shape, bytes, share of zero weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", type=Path, help="checkpoint folder, such as runs/demo/packed-2bit")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verify the checkpoint; returns what it holds."""
    model = load_model(args.path)  # verifies the files and that the tensors fit the config
    layout, config, tensors = model_layout(model), model.config, model.state_dict()
    by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + tensor.numel() * tensor.element_size()
    return {
        "path": str(args.path),
        "layout": layout,
        "bits_per_expert_weight": None if layout is None else bits_per_expert_weight(config, layout),
        "num_tensors": len(tensors),
        "file_bytes": folder_bytes(args.path),
        "bytes_by_dtype": by_dtype,
        "share_of_zero_weights": _share_of_zeros(tensors, config.hidden_size, layout),
        "model": config.to_dict(),
    }


def _share_of_zeros(tensors: dict[str, torch.Tensor], hidden_size: int, layout: Any) -> float | None:
    """Return the share of zeros among the gate and up weights of packed experts."""
    packed = [tensor for name, tensor in tensors.items() if name.endswith(("gate_packed", "up_packed"))]
    if layout is None or not packed:
        return None
    zeros = [float((unpack(tensor, hidden_size, layout) == 0).float().mean()) for tensor in packed]
    return sum(zeros) / len(zeros)
