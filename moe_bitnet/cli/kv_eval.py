"""``moe-bitnet kv-eval``: what quantized KV caches do to a Hugging Face model, against a 16-bit cache on the same text.

The text passes through all caches side by side, a page (64 tokens) at a time at most, so that every token sees the
pages that it would see in decoding. Printed are the divergence of the next-token distributions (KLD, nats a token), how
often the most likely token is the same, the perplexity, and how many needles are found again.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvcache.moments import Moments
from kvcache.quality import LogitComparison, make_needles
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:  # transformers is optional and slow to import
    from kvcache.hf.evaluation import CacheQuality

HELP = "compare quantized KV caches with a 16-bit one under a Hugging Face model: KLD, PPL, needles"
DEFAULT_FORMATS = "K8V8,K8V4,K4V4,K4V2,K2V2"
NO_CALIBRATION = "none"
DTYPES = ("float32", "bfloat16", "float16")

# Nobody needs more characters than these for a token of text.
_CHARACTERS_PER_TOKEN = 12
# Room for a needle's question and answer behind the text.
_QUESTION_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a causal language model")
    parser.add_argument("--gguf-file", metavar="FILE", help="weights within that folder, if they are a GGUF file")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="weights and activations (default: float32)")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to read")
    parser.add_argument("--tokens", type=int, default=6144, help="how much of it, needles included (default: 6144)")
    parser.add_argument("--skip", type=int, default=512, help="first tokens that are not compared (default: 512)")
    parser.add_argument("--formats", default=DEFAULT_FORMATS, help=f"key and value bits (default: {DEFAULT_FORMATS})")
    parser.add_argument(
        "--calibrate", default=NO_CALIBRATION, metavar="FILE", help="another text to calibrate with (default: none)"
    )
    parser.add_argument("--calibrate-tokens", type=int, default=8192, help="how much of that one (default: 8192)")
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a forward pass; divides 64 (default: 64)")
    parser.add_argument("--needles", type=int, default=8, help="hidden words to ask for; 0 for none (default: 8)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate all formats; returns one entry each."""
    _check(args)
    model, tokenize = _load(args.model, args.gguf_file, args.dtype)
    result = evaluate(args, model, tokenize)
    if not args.json:
        _print_table(result)
    return result


def evaluate(args: argparse.Namespace, model: Any, tokenize: Callable[[str], Tensor]) -> dict[str, Any]:
    """Run the caches of all formats over the text.

    Args:
        args: the options.
        model: a causal language model of transformers.
        tokenize: text to int64 ``[num_tokens]``, without special tokens.
    """
    from kvcache.hf.evaluation import (
        CacheFormat,
        cache_config,
        evaluate_caches,
        make_cache,
        parse_format,
        text_with_needles,
        tokenize_needles,
    )

    formats = [parse_format(text) for text in args.formats.split(",")]
    _check_positions(model, args.tokens)
    needles = tokenize_needles(make_needles(args.needles), tokenize)
    token_ids = text_with_needles(_read(args.text, tokenize, args.tokens), needles, args.tokens)
    moments = _moments(args, model, tokenize)
    max_tokens = args.tokens + _QUESTION_TOKENS
    caches = {str(each): make_cache(model, each, max_tokens, moments) for each in formats}
    with progress_bar("reading", args.tokens - 1) as bar:
        qualities = evaluate_caches(
            model,
            token_ids,
            needles,
            make_cache(model, CacheFormat(16, 16), max_tokens, None),
            caches,
            chunk_len=args.chunk,
            num_skipped=min(args.skip, args.tokens // 2),
            on_chunk=lambda done, comparisons: bar.update(done, _remark(comparisons)),
        )
    bits = {str(each): cache_config(model, each).effective_bits for each in formats}
    return {
        "model": str(args.model),
        "text": str(args.text),
        "num_tokens": args.tokens,
        "calibration": None if moments is None else args.calibrate,
        "formats": [_entry(name, bits[name], quality) for name, quality in qualities.items()],
    }


def _check(args: argparse.Namespace) -> None:
    for option, least in (("tokens", 2), ("skip", 0), ("calibrate_tokens", 1)):
        if getattr(args, option) < least:
            name = option.replace("_", "-")
            raise ConfigError(f"kv-eval: --{name} is {getattr(args, option)}; give at least {least}.")
    if args.calibrate != NO_CALIBRATION and Path(args.calibrate).resolve() == args.text.resolve():
        raise ConfigError(f"kv-eval: --calibrate is the text itself ({args.text}). Give another one, or none.")
    if not args.model.is_dir():
        raise CheckpointError(f"kv-eval: --model {args.model} is no folder. Give one that holds a model and tokenizer.")


def _load(folder: Path, gguf_file: str | None, dtype: str) -> tuple[Any, Callable[[str], Tensor]]:
    """Load a model and its tokenizer from a folder alone."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"kv-eval needs transformers ({error}). Run pip install 'moe-bitnet[hf]'.") from error
    options = {"local_files_only": True, **({"gguf_file": gguf_file} if gguf_file else {})}
    say(f"loading {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({error}). Give another folder.") from error
    return model.eval(), lambda text: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_positions(model: Any, num_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and num_tokens > positions:
        raise ConfigError(f"kv-eval: --tokens is {num_tokens}; the model was made for {positions}. Give fewer.")


def _read(path: Path, tokenize: Callable[[str], Tensor], num_tokens: int) -> Tensor:
    """Return the first tokens of a text, as many as there are, at most ``num_tokens``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}). Give a UTF-8 file.") from error
    if not text:
        raise DataError(f"{path} is empty. Give a text.")
    return tokenize(text[: num_tokens * _CHARACTERS_PER_TOKEN])[:num_tokens]


def _moments(args: argparse.Namespace, model: Any, tokenize: Callable[[str], Tensor]) -> Moments | None:
    if args.calibrate == NO_CALIBRATION:
        return None
    from kvcache.hf import calibrate

    say(f"calibrating with {args.calibrate}")
    return calibrate(model, _read(Path(args.calibrate), tokenize, args.calibrate_tokens))


def _remark(comparisons: Mapping[str, LogitComparison]) -> str:
    means = {name: comparison.kld_mean for name, comparison in comparisons.items()}
    return "KLD " + "  ".join(f"{name} {mean:.5f}" for name, mean in means.items() if mean is not None)


def _entry(name: str, effective_bits: float, quality: "CacheQuality") -> dict[str, Any]:
    logits = quality.logits
    return {
        "format": name,
        "effective_bits": effective_bits,
        **dataclasses.asdict(logits),
        "ppl_change": logits.ppl_change,
        "needles": None if quality.retrieval is None else dataclasses.asdict(quality.retrieval),
    }


def _print_table(result: Mapping[str, Any]) -> None:
    """Write the formats to stdout, one row each."""
    first = result["formats"][0]
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.title = f"{first['num_tokens']} tokens compared; 16-bit PPL {first['reference_ppl']:.4f}"
    columns = ("format", "bits", "KLD mean", "± s.e.", "median", "99.9 %", "same top-1", "PPL", "change", "needles")
    for column in columns:
        table.add_column(column, justify="left" if column == "format" else "right")
    for entry in result["formats"]:
        table.add_row(*_cells(entry))
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)


def _cells(entry: Mapping[str, Any]) -> list[str]:
    needles = entry["needles"]
    found = "" if needles is None else f"{needles['num_found']} ({needles['num_reference_found']} at 16 bits)"
    return [
        entry["format"],
        f"{entry['effective_bits']:.3f}",
        f"{entry['kld_mean']:.6f}",
        f"{entry['kld_standard_error']:.6f}",
        f"{entry['kld_median']:.6f}",
        f"{entry['kld_p999']:.4f}",
        f"{entry['top1_agreement']:.4f}",
        f"{entry['ppl']:.4f}",
        f"{100 * entry['ppl_change']:+.3f} %",
        found,
    ]
