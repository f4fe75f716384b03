"""Token shards: documents enter, Parquet files of token ids leave, and are read back as one array.

    folder/
    ├── train-00000.parquet ...        name: string, token_ids: list<uint16 | int32>; a row is a document
    ├── validation-00000.parquet ...
    ├── tokenizer.json
    └── summary.json                   a ShardSummary

A document goes to validation by a hash of its text, so neither its name nor the
order nor other documents move it to the other side. What becomes of the tokens
is told in :mod:`cluster.training.batches`.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cluster.training.document import Document, content_hash, sample_documents
from cluster.training.shard_file import REBUILD, count_tokens, read_shard, write_shard
from cluster.training.token_array import Tokens, fill_tokens, token_chunks
from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.files import read_json, replace_directory, write_json_atomically
from moe_bitnet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
Progress = Callable[[int, int], None]

DEFAULT_VALIDATION_FRACTION = 0.05
_SUMMARY = "summary.json"
_SPLITS: tuple[Split, ...] = ("train", "validation")
_ENCODE_CHUNK = 32  # documents encoded together: enough for all cores, few enough for memory and smooth progress


@dataclass(frozen=True)
class ShardSummary:
    """What a folder of shards holds; written beside them as ``summary.json``.

    Attributes:
        source: where the text came from, in words.
        vocab_size: V of the tokenizer; every token id is below it.
        end_of_text_id: the id that closes each document when shards are loaded.
        seed: of the split.
        validation_fraction: the share of documents asked for.
        num_train_documents: rows of the training shards.
        num_validation_documents: rows of the validation shards.
        train_bytes: UTF-8 bytes of the training texts.
        validation_bytes: UTF-8 bytes of the validation texts.
        num_train_tokens: length of ``load_tokens(folder, "train")``: one end of text a document included.
        num_validation_tokens: length of ``load_tokens(folder, "validation")``, counted alike.
        bytes_per_token: ``validation_bytes / num_validation_tokens``; a loss in nats a token divided by
            this and by ln 2 is the loss in bits a byte.
    """

    source: str
    vocab_size: int
    end_of_text_id: int
    seed: int
    validation_fraction: float
    num_train_documents: int
    num_validation_documents: int
    train_bytes: int
    validation_bytes: int
    num_train_tokens: int
    num_validation_tokens: int
    bytes_per_token: float


# --- Building ---------------------------------------------------------------------------------------------------


def split_documents(
    documents: Sequence[Document],
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    seed: int = 0,
) -> tuple[list[Document], list[Document]]:
    """Divide documents into training and validation by a hash of their text and ``seed``.

    Equal texts land on the same side. If chance leaves a side empty, the document whose hash is nearest to
    that side is moved there (the one case in which other documents matter).

    Args:
        documents: at least two distinct texts.
        validation_fraction: the expected share of validation documents, above 0 and below 1.
        seed: another seed gives another split.
    Returns:
        Training and validation documents, each in the order given.
    Raises:
        ConfigError: ``validation_fraction`` is not between 0 and 1.
        DataError: fewer than two distinct texts.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction is {validation_fraction}. Pass a number above 0 and below 1, such as 0.05."
        )
    hashes = [int.from_bytes(content_hash(document, b"split", seed), "big") for document in documents]
    if len(set(hashes)) < 2:
        raise DataError(
            f"There are {len(set(hashes))} distinct documents, but training and validation need one each. Pass more "
            "files, or cut the text into shorter documents."
        )
    boundary = int(validation_fraction * 2**128)
    # At least the smallest hash is below the boundary, and at least the largest is not.
    boundary = min(max(boundary, min(hashes) + 1), max(hashes))
    train = [document for document, value in zip(documents, hashes, strict=True) if value >= boundary]
    validation = [document for document, value in zip(documents, hashes, strict=True) if value < boundary]
    return train, validation


def train_tokenizer(documents: Sequence[Document], vocab_size: int, max_bytes: int = 32 * 1024**2) -> Tokenizer:
    """Train a tokenizer on at most ``max_bytes`` of ``documents``, sampled by the hash of their texts.

    Pass training documents only: a tokenizer that has seen the validation text compresses it a little better.

    Raises:
        ConfigError: ``vocab_size`` is below 257 or ``max_bytes`` below 1.
    """
    return Tokenizer.train((document.text for document in sample_documents(documents, max_bytes)), vocab_size)


def build_shards(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    *,
    seed: int = 0,
    source: str = "",
    tokens_per_shard: int = 4 * 1024**2,
    progress: Progress | None = None,
) -> ShardSummary:
    """Tokenize documents and write them as shards; an interruption leaves ``folder`` as it was.

    Args:
        documents: the texts; empty ones are left out.
        tokenizer: encodes them; a copy is saved beside the shards.
        folder: where the shards go; replaced if it holds shards already.
        validation_fraction: see :func:`split_documents`.
        seed: of the split.
        source: where the text came from, in words.
        tokens_per_shard: a shard is closed when it has at least this many tokens.
        progress: called with (documents done, documents in total).
    Returns:
        The summary that was written.
    Raises:
        ConfigError: ``validation_fraction`` or ``tokens_per_shard`` is out of range.
        DataError: too few documents, or ``folder`` holds something else or cannot be written.
    """
    if tokens_per_shard < 1:
        raise ConfigError(f"build_shards: tokens_per_shard is {tokens_per_shard}. Pass at least 1.")
    texts = [document for document in documents if document.text]
    sides = dict(zip(_SPLITS, split_documents(texts, validation_fraction, seed), strict=True))
    num_tokens: dict[str, int] = {}
    num_done = 0

    def report(num_documents: int) -> None:
        nonlocal num_done
        num_done += num_documents
        if progress is not None:
            progress(num_done, len(texts))

    _check_replaceable(folder)
    try:
        with replace_directory(folder) as new:
            for split, side in sides.items():
                num_tokens[split] = _write_split(new, split, side, tokenizer, tokens_per_shard, report)
            summary = _summarize(sides, num_tokens, tokenizer, source, seed, validation_fraction)
            tokenizer.save(new / "tokenizer.json")
            write_json_atomically(new / _SUMMARY, dataclasses.asdict(summary))
    except OSError as error:
        raise DataError(
            f"The shards cannot be written to {folder} ({error}). Pass a folder that is writable, on a disk with room."
        ) from error
    logger.info(
        "%s: %d + %d documents, %.2f M + %.2f M tokens (train + validation), %.2f bytes/token",
        folder,
        summary.num_train_documents,
        summary.num_validation_documents,
        summary.num_train_tokens / 1e6,
        summary.num_validation_tokens / 1e6,
        summary.bytes_per_token,
    )
    return summary


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that this module did not write."""
    if folder.is_dir() and ((folder / _SUMMARY).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise DataError(
            f"{folder} exists and holds no shards, so it is not replaced. Pass a new folder, or one with older shards."
        )


def _write_split(
    folder: Path,
    split: Split,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    tokens_per_shard: int,
    report: Callable[[int], None],
) -> int:
    """Write the shards of one split; return its tokens, ends of text included."""
    names: list[str] = []
    rows: list[npt.NDArray[np.int32]] = []
    num_tokens = num_pending = num_shards = 0
    for start in range(0, len(documents), _ENCODE_CHUNK):
        chunk = documents[start : start + _ENCODE_CHUNK]
        encoded = tokenizer.encode_batch([document.text for document in chunk])
        for document, token_ids in zip(chunk, encoded, strict=True):
            names.append(document.name)
            rows.append(np.array(token_ids, dtype=np.int32))
            num_pending += len(token_ids)
            num_tokens += len(token_ids) + 1
            if num_pending >= tokens_per_shard:
                write_shard(folder / f"{split}-{num_shards:05d}.parquet", names, rows, tokenizer.vocab_size)
                names, rows, num_pending, num_shards = [], [], 0, num_shards + 1
        report(len(chunk))
    if rows:
        write_shard(folder / f"{split}-{num_shards:05d}.parquet", names, rows, tokenizer.vocab_size)
    return num_tokens


def _summarize(
    sides: dict[Split, list[Document]],
    num_tokens: dict[str, int],
    tokenizer: Tokenizer,
    source: str,
    seed: int,
    validation_fraction: float,
) -> ShardSummary:
    num_bytes = {split: sum(document.num_bytes for document in side) for split, side in sides.items()}
    return ShardSummary(
        source=source,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        seed=seed,
        validation_fraction=validation_fraction,
        num_train_documents=len(sides["train"]),
        num_validation_documents=len(sides["validation"]),
        train_bytes=num_bytes["train"],
        validation_bytes=num_bytes["validation"],
        num_train_tokens=num_tokens["train"],
        num_validation_tokens=num_tokens["validation"],
        bytes_per_token=num_bytes["validation"] / num_tokens["validation"],
    )


# --- Reading ----------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> ShardSummary:
    """Read ``summary.json`` of a folder of shards.

    Raises:
        DataError: the folder or the file is missing, or the file is not a summary.
    """
    path = folder / _SUMMARY
    try:
        fields = read_json(path)
    except OSError as error:
        raise _missing_summary(folder, error) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). {REBUILD}") from error
    expected = {field.name: field.type for field in dataclasses.fields(ShardSummary)}
    if not isinstance(fields, dict) or set(fields) != set(expected):
        raise DataError(f"{path} does not have the fields {sorted(expected)}. {REBUILD}")
    for name, kind in expected.items():
        is_number = kind in (int, float) and isinstance(fields[name], int) and not isinstance(fields[name], bool)
        if not is_number and type(fields[name]) is not kind:
            raise DataError(f"{path}: {name} is {fields[name]!r}, not of type {kind}. {REBUILD}")
    return ShardSummary(**fields)


def load_tokens(folder: Path, split: Split) -> Tokens:
    """Load all documents of a split, one after the other, each closed by the end of text.

    Shards are read some documents at a time into the one array that is returned; a long one is a memory-mapped
    temporary file, see :mod:`cluster.training.token_array`.

    Args:
        folder: written by :func:`build_shards`.
        split: ``"train"`` or ``"validation"``.
    Returns:
        ``[num_tokens]``, int32, C-contiguous.
    Raises:
        DataError: the split is missing, or a shard is truncated, empty, altered, missing, or not of this
            vocabulary; or the temporary folder has no room.
    """
    if split not in _SPLITS:
        raise DataError(f"There is no split {split!r}. Pass one of {list(_SPLITS)}.")
    summary = read_summary(folder)
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    if not paths:
        raise DataError(f"{folder} holds no {split}-*.parquet. {REBUILD}")
    num_tokens = summary.num_train_tokens if split == "train" else summary.num_validation_tokens
    # Counted first, so that a wrong summary cannot ask for more memory than the shards fill.
    num_found = sum(count_tokens(path) for path in paths)
    if num_found != num_tokens:
        raise DataError(
            f"{folder} holds {num_found} tokens of {split}, its {_SUMMARY} says {num_tokens}: shards were lost, added "
            f"or altered. {REBUILD}"
        )
    parts = (part for path in paths for part in read_shard(path, summary.vocab_size, summary.end_of_text_id))
    return fill_tokens(parts, num_tokens)


def data_fingerprint(train_tokens: Tokens, validation_tokens: Tokens) -> str:
    """Return a SHA-256 over the tokens of both splits, read piece by piece."""
    digest = hashlib.sha256()
    for tokens in (train_tokens, validation_tokens):
        digest.update(len(tokens).to_bytes(8, "little"))
        for chunk in token_chunks(tokens):
            digest.update(chunk)
    return digest.hexdigest()


def _missing_summary(folder: Path, error: OSError) -> DataError:
    """Say what to do with a folder without a summary, also where another program wrote Parquet files into it."""
    if not any(folder.glob("*.parquet")):
        return DataError(f"{folder} holds no {_SUMMARY} ({error.strerror}). Pass a folder of shards.")
    fields = ", ".join(field.name for field in dataclasses.fields(ShardSummary))
    return DataError(
        f"{folder} holds Parquet files but no {_SUMMARY}: another program wrote them. Files of texts become shards by "
        f"`moe-bitnet data --data {folder}`. Files of token ids can be used as they are if their names are "
        f"train-*.parquet and validation-*.parquet, with the columns (name: string, token_ids: list<uint16 or "
        f"int32>), beside tokenizer.json and a {_SUMMARY} with the fields {fields}."
    )
