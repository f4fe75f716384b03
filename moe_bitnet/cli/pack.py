"""``moe-bitnet pack``: latent weights → packed ternary checkpoints, and the twin in float16."""

import argparse
from pathlib import Path
from typing import Any

import torch

from cluster.training.shards import load_tokens
from moe_bitnet.checkpoint.native import load_model, save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.checkpoint.sizes import bits_per_expert_weight, folder_bytes, model_sizes
from moe_bitnet.cli.console import say
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.files import write_json_atomically
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import LAYOUTS, Layout
from moe_bitnet.units import format_bytes

HELP = "pack a trained ternary model in 2 bits and in 1.6 bits a weight, and check its logits"
NUM_CHECKED_TOKENS = 256
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of the logits, to the largest one: integers are equal, so float32 rounding is all that may differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, help="checkpoint to pack (default: the run's ternary model)")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: both")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Pack the model; returns sizes and the largest logit difference."""
    return pack_run(RunFolder(args.run), args.model, tuple(args.layout or LAYOUTS))


def pack_run(run_folder: RunFolder, source: Path | None, layouts: tuple[Layout, ...] = LAYOUTS) -> dict[str, Any]:
    """Pack the ternary model in each layout, store the twin in float16; returns sizes and differences."""
    source = source or run_folder.require_checkpoint(run_folder.model("ternary"), "train")
    model = load_model(source)
    config = model.config
    twin_bytes = _store_twin(run_folder, config) if config.is_packable else None
    token_ids = _some_tokens(run_folder, config.vocab_size)
    with torch.inference_mode():
        expected = model(token_ids).logits
    results, differences = [], []
    for layout in layouts:
        packed = pack_model(model, layout)
        folder = run_folder.packed(layout)
        differences.append(_largest_difference(packed, token_ids, expected))
        if not differences[-1] <= MAX_RELATIVE_DIFFERENCE * float(expected.abs().max()):
            raise CheckpointError(
                f"{source}: packed as {layout}, its logits differ by {differences[-1]}, more than rounding; "
                f"nothing was saved. Are its weights finite?"
            )
        save_model(packed, folder)
        sizes = model_sizes(config, layout)
        file_bytes = folder_bytes(folder)
        results.append(
            {
                "layout": layout,
                "file_bytes": file_bytes,
                "expert_bytes": sizes.expert_bytes * sizes.num_experts,
                "bits_per_expert_weight": bits_per_expert_weight(config, layout),
            }
        )
        say(f"packed {folder}: {format_bytes(file_bytes)}, logits differ by {differences[-1]:.2g} at most")
    fp16_sizes = model_sizes(config.replace(precision="float"))
    result = {
        "layouts": results,
        "fp16_expert_bytes": fp16_sizes.expert_bytes * fp16_sizes.num_experts,
        "fp16_file_bytes": twin_bytes or fp16_sizes.total_bytes,
        "max_abs_logit_difference": max(differences),
        "max_abs_logit": float(expected.abs().max()),
    }
    write_json_atomically(run_folder.json_file("pack"), result)
    return result


def _store_twin(run_folder: RunFolder, config: ModelConfig) -> int | None:
    """Write the float twin in float16 and return its bytes on disk; ``None`` if the run has no twin."""
    source = run_folder.model("float")
    if not source.is_dir():
        say("the run has no float twin; its FP16 size is computed from the shape")
        return None
    twin = load_model(source)
    if twin.config.replace(precision="ternary") != config:
        raise ConfigError(
            f"{source}: is no twin of the model to pack; their shapes differ. Pack a model of this run, "
            f"or choose a --run of its own."
        )
    save_model(twin, run_folder.twin, float_dtype=torch.float16)
    say(f"stored the float twin in float16: {run_folder.twin}")
    return folder_bytes(run_folder.twin)


def _some_tokens(run_folder: RunFolder, vocab_size: int) -> torch.Tensor:
    """Return ``[1, n]`` tokens of validation text, or evenly spread ids if the run has no data."""
    if run_folder.data.is_dir():
        tokens = torch.from_numpy(load_tokens(run_folder.data, "validation")[:NUM_CHECKED_TOKENS].astype("int64"))
    else:
        tokens = torch.linspace(0, vocab_size - 1, NUM_CHECKED_TOKENS).long()
    return tokens[None]


@torch.inference_mode()
def _largest_difference(model: MoETransformer, token_ids: torch.Tensor, expected: torch.Tensor) -> float:
    return float((model(token_ids).logits - expected).abs().max())
