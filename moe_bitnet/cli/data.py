"""``moe-bitnet data``: text on this machine → tokenizer and token shards."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cluster.training.corpus import Corpus, collect_documents
from cluster.training.shards import build_shards, read_summary, split_documents, train_tokenizer
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.tokenizer import Tokenizer

HELP = "build token shards from text: the standard library's sources, or your own"
VALIDATION_FRACTION = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="text files (also gzip), folders or Parquet files (default: the Python standard library's sources)",
    )
    parser.add_argument("--text-column", help="column of the Parquet files that holds the text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the byte-level BPE (default: 4096)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json to use as it is, such as that of an upcycled model (default: train one)",
    )
    parser.add_argument("--max-mb", type=arguments.megabytes, help="use at most this many MB of text, sampled evenly")
    parser.add_argument(
        "--seed",
        type=arguments.seed,
        default=0,
        help="of the split into training and validation documents (default: 0)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build the shards; returns their summary."""
    run_folder = RunFolder(args.run)
    return build_data(run_folder, args.data, args.vocab_size, args.text_column, args.max_mb, args.seed, args.tokenizer)


def build_data(
    run_folder: RunFolder,
    paths: list[Path],
    vocab_size: int,
    text_column: str | None = None,
    max_bytes: int | None = None,
    seed: int = 0,
    tokenizer_file: Path | None = None,
) -> dict[str, Any]:
    """Collect documents, train the tokenizer unless one is given, write the shards; returns the summary."""
    given = None if tokenizer_file is None else Tokenizer.load(tokenizer_file)
    corpus = collect_documents(paths, text_column=text_column, max_bytes=max_bytes)
    say(
        f"corpus: {len(corpus.documents)} documents, {corpus.num_bytes / 1e6:.1f} MB from {corpus.source} "
        f"({corpus.num_skipped_files} unreadable files skipped, {corpus.num_duplicates} duplicates dropped)"
    )
    tokenizer = given or _train_tokenizer(corpus, vocab_size, seed)
    with progress_bar("tokenize", len(corpus.documents)) as bar:
        build_shards(
            corpus.documents,
            tokenizer,
            run_folder.data,
            VALIDATION_FRACTION,
            seed=seed,
            source=corpus.source,
            progress=lambda done, total: bar.update(done, f"{done} of {total} documents"),
        )
    return summarize(run_folder)


def _train_tokenizer(corpus: Corpus, vocab_size: int, seed: int) -> Tokenizer:
    # it must not see validation text
    train_documents, _ = split_documents(corpus.documents, VALIDATION_FRACTION, seed)
    say(f"training a byte-level BPE of {vocab_size} tokens on {len(train_documents)} documents")
    return train_tokenizer(train_documents, vocab_size)


def summarize(run_folder: RunFolder) -> dict[str, Any]:
    """Return the summary of the shards as a dictionary."""
    return dataclasses.asdict(read_summary(run_folder.data))
