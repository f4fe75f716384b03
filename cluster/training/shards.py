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
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from cluster.training.document import Document, content_hash, sample_documents
from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.files import read_json, replace_directory, write_json_atomically
from moe_bitnet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
Tokens = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]

DEFAULT_VALIDATION_FRACTION = 0.05
_SUMMARY = "summary.json"
_SPLITS: tuple[Split, ...] = ("train", "validation")
_ENCODE_CHUNK = 32  # documents encoded together: enough for all cores, few enough for memory and smooth progress
_READ_CHUNK = 1024  # documents held as Arrow lists while reading
_REBUILD = "Build the shards again."


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
                _write_shard(folder / f"{split}-{num_shards:05d}.parquet", names, rows, tokenizer.vocab_size)
                names, rows, num_pending, num_shards = [], [], 0, num_shards + 1
        report(len(chunk))
    if rows:
        _write_shard(folder / f"{split}-{num_shards:05d}.parquet", names, rows, tokenizer.vocab_size)
    return num_tokens


def _write_shard(path: Path, names: list[str], rows: list[npt.NDArray[np.int32]], vocab_size: int) -> None:
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    token_ids = pyarrow.ListArray.from_arrays(offsets, np.concatenate(rows).astype(dtype))
    table = pyarrow.table({"name": pyarrow.array(names, pyarrow.string()), "token_ids": token_ids})
    # Checksums turn a flipped bit into an error; without them it would be another token.
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=_READ_CHUNK, write_page_checksum=True)


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
        raise DataError(f"{folder} holds no {_SUMMARY} ({error.strerror}). Pass a folder of shards.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). {_REBUILD}") from error
    expected = {field.name: field.type for field in dataclasses.fields(ShardSummary)}
    if not isinstance(fields, dict) or set(fields) != set(expected):
        raise DataError(f"{path} does not have the fields {sorted(expected)}. {_REBUILD}")
    for name, kind in expected.items():
        is_number = kind in (int, float) and isinstance(fields[name], int) and not isinstance(fields[name], bool)
        if not is_number and type(fields[name]) is not kind:
            raise DataError(f"{path}: {name} is {fields[name]!r}, not of type {kind}. {_REBUILD}")
    return ShardSummary(**fields)


def load_tokens(folder: Path, split: Split) -> Tokens:
    """Load all documents of a split, one after the other, each closed by the end of text.

    Shards are read a thousand documents at a time into the one array that is returned.

    Args:
        folder: written by :func:`build_shards`.
        split: ``"train"`` or ``"validation"``.
    Returns:
        ``[num_tokens]``, int32, C-contiguous.
    Raises:
        DataError: the split is missing, or a shard is truncated, empty, altered, missing, or not of this
            vocabulary.
    """
    if split not in _SPLITS:
        raise DataError(f"There is no split {split!r}. Pass one of {list(_SPLITS)}.")
    summary = read_summary(folder)
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    if not paths:
        raise DataError(f"{folder} holds no {split}-*.parquet. {_REBUILD}")
    num_tokens = summary.num_train_tokens if split == "train" else summary.num_validation_tokens
    # Counted first, so that a wrong summary cannot ask for more memory than the shards fill.
    num_found = sum(_count_tokens(path) for path in paths)
    if num_found != num_tokens:
        raise DataError(
            f"{folder} holds {num_found} tokens of {split}, its {_SUMMARY} says {num_tokens}: shards were lost, added "
            f"or altered. {_REBUILD}"
        )
    tokens = np.empty(num_tokens, dtype=np.int32)
    end = 0
    for path in paths:
        for part in _read_shard(path, summary):
            tokens[end : end + len(part)] = part
            end += len(part)
    assert end == num_tokens
    return tokens


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    """Yield a checked Parquet file; damage that shows while it is read becomes a DataError."""
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow)
            if file.metadata.num_rows == 0:
                raise DataError(f"The shard {path} holds no documents. {_REBUILD}")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"The shard {path} is truncated or altered ({error}). {_REBUILD}") from error


def _count_tokens(path: Path) -> int:
    """Return the tokens of a shard, ends of text included, from its footer alone."""
    with _open_shard(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        columns = [group.column(index) for group in groups for index in range(group.num_columns)]
        num_values = sum(column.num_values for column in columns if column.path_in_schema.startswith("token_ids."))
        return int(num_values + metadata.num_rows)


def _read_shard(path: Path, summary: ShardSummary) -> Iterator[Tokens]:
    """Yield the tokens of a shard, some documents at a time, an end of text after each document."""
    with _open_shard(path) as file:
        for batch in file.iter_batches(batch_size=_READ_CHUNK, columns=["token_ids"]):
            yield _flatten(path, batch.column(0), summary)


def _flatten(path: Path, rows: Any, summary: ShardSummary) -> Tokens:
    lengths = rows.value_lengths()
    flat = rows.flatten()
    if rows.null_count or flat.null_count or 0 in lengths.to_numpy():
        raise DataError(f"The shard {path} holds a document without token ids. {_REBUILD}")
    values = flat.to_numpy().astype(np.int32)
    if not 0 <= values.min() <= values.max() < summary.vocab_size:
        wrong = values.min() if values.min() < 0 else values.max()
        raise DataError(
            f"The shard {path} holds token id {wrong}, but the vocabulary has {summary.vocab_size} tokens "
            f"(0 to {summary.vocab_size - 1}). {_REBUILD}"
        )
    with_ends: Tokens = np.insert(values, np.cumsum(lengths.to_numpy()), summary.end_of_text_id)
    return with_ends


def _check_columns(path: Path, schema: Any) -> None:
    types = {field.name: field.type for field in schema}
    allowed = (pyarrow.list_(pyarrow.uint16()), pyarrow.list_(pyarrow.int32()))
    if types.get("name") != pyarrow.string() or types.get("token_ids") not in allowed:
        found = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise DataError(
            f"The shard {path} has the columns ({found}), not (name: string, token_ids: list<uint16 or int32>). "
            f"{_REBUILD}"
        )
