"""``moe-bitnet upcycle``: a dense LLaMA-like checkpoint → a ternary mixture of experts that training goes on from.

``mote`` keeps the dense model in float and adds ternary routed experts that start at zero: the new model predicts what
the dense one does. ``ternary`` makes everything ternary, with copies of the dense network as experts: it must be
trained before it is of use. The source's tokenizer is saved beside the model.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.training.corpus import collect_documents
from moe_bitnet.checkpoint.manifest import write_manifest
from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.checkpoint.sizes import folder_bytes, model_sizes
from moe_bitnet.checkpoint.upcycle import RECIPES, UpcycleSettings, upcycle
from moe_bitnet.checkpoint.upcycle_source import dense_model
from moe_bitnet.checkpoint.upcycle_statistics import collect_statistics
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.cli.dense_source import DenseSource, read_dense_source
from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.tokenizer import Tokenizer

HELP = "make a ternary mixture of experts of a dense LLaMA-like checkpoint, to go on training from"
TOKENIZER_NAME = "tokenizer.json"
_SEQ_LEN = 256
_BYTES_PER_TOKEN = 8  # more than text of any kind needs
_MIN_BYTES = 65_536  # some whole documents, however few tokens are asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, help="folder of a Hugging Face checkpoint, or a GGUF file")
    parser.add_argument("out", type=Path, help="folder of the new checkpoint")
    parser.add_argument("--recipe", choices=RECIPES, default="mote", help="default: mote")
    parser.add_argument("--experts", type=int, default=4, help="routed experts a layer (default: 4)")
    parser.add_argument("--top-k", type=int, default=1, help="experts that a token visits (default: 1)")
    parser.add_argument(
        "--expert-width", type=int, default=0, help="inner width of a routed expert (default: the dense network's)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="text to calibrate with (default: the Python standard library's sources)",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="how much of it (default: 4096)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of noise and routers (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert the checkpoint; returns the new model's shape and bytes."""
    if args.tokens < 2:
        raise ConfigError(f"upcycle: --tokens is {args.tokens}; give at least 2.")
    settings = UpcycleSettings(args.recipe, args.experts, args.top_k, args.expert_width, seed=args.seed)
    say(f"loading {args.source}")
    source = read_dense_source(args.source)
    dense = dense_model(source.settings, source.tensors, str(args.source))
    token_ids = calibration_ids(source, args.text, args.tokens)
    with progress_bar("calibrate", len(token_ids)) as bar:
        statistics = collect_statistics(dense, token_ids, lambda done: bar.update(done, f"{done} sequences"))
    model = upcycle(dense, settings, statistics)
    save_model(model, args.out)
    has_tokenizer = _save_tokenizer(source, args.out)
    say(_next_steps(args.out, settings))
    float_sizes, packed_sizes = model_sizes(model.config), model_sizes(model.config, "2bit")
    return {
        "source": str(args.source),
        "out": str(args.out),
        "recipe": args.recipe,
        "tokenizer": str(args.out / TOKENIZER_NAME) if has_tokenizer else None,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file_bytes": folder_bytes(args.out),
        "expert_bytes_float16": float_sizes.expert_bytes * float_sizes.num_experts,
        "expert_bytes_2bit": packed_sizes.expert_bytes * packed_sizes.num_experts,
        "settings": dataclasses.asdict(settings),
        "model": model.config.to_dict(),
    }


def _next_steps(folder: Path, settings: UpcycleSettings) -> str:
    """Say how to go on; the learning rates of models from scratch are too high here."""
    text = (
        f"go on with: moe-bitnet data --tokenizer {folder / TOKENIZER_NAME}; "
        f"moe-bitnet train --initial-model {folder} --learning-rate 1e-3"
    )
    frozen = " (and has_frozen_backbone = true in a settings file, to train the new experts alone)"
    return text + (frozen if settings.recipe == "mote" else "")


def calibration_ids(source: DenseSource, paths: list[Path], num_tokens: int) -> Tensor:
    """Return int64 ``[B, S]`` of text, about ``num_tokens`` of it in sequences of at most 256.

    Raises:
        DataError: the texts are shorter than two tokens.
    """
    max_bytes = max(_MIN_BYTES, num_tokens * _BYTES_PER_TOKEN)
    corpus = collect_documents(paths, max_bytes=max_bytes, max_document_bytes=_SEQ_LEN * 4)
    token_ids = source.token_ids("\n\n".join(document.text for document in corpus.documents))[:num_tokens]
    seq_len = min(_SEQ_LEN, len(token_ids))
    if seq_len < 2:
        raise DataError(f"upcycle: {corpus.source} gives {len(token_ids)} tokens. Give more text to calibrate with.")
    num_sequences = len(token_ids) // seq_len
    return torch.tensor(token_ids[: num_sequences * seq_len]).view(num_sequences, seq_len)


def _save_tokenizer(source: DenseSource, folder: Path) -> bool:
    """Put the source's tokenizer beside the model, if ``moe-bitnet data`` can use it."""
    text = source.tokenizer_json()
    try:
        if text is None:
            raise DataError("It is not one of the tokenizers library.")
        tokenizer = Tokenizer.from_json(text)
    except DataError as error:
        say(f"the tokenizer is not saved, so that text must be tokenized elsewhere: {error}")
        return False
    tokenizer.save(folder / TOKENIZER_NAME)
    write_manifest(folder)
    return True
