"""Documents of real text: paths enter, a deduplicated list of named texts leaves.

Without a path the text is the standard library of the running interpreter, see
:mod:`cluster.training.standard_library`. Nothing is downloaded.

A file is judged by its content, not by its suffix: UTF-8 without a NUL byte is
text, also if gzip compressed it. Only ``.parquet`` is opened as a table. Long texts are cut at line ends,
so that one long file can be shared out between training and validation.

Limits: what is kept lies in memory (bound it with ``max_bytes``), and only exact
duplicates are dropped: a file that differs in one character stays.
"""

import gzip
import logging
import os
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from cluster.training.document import Document, content_hash, cut_document, sample_documents
from cluster.training.standard_library import (
    FOREIGN_FOLDERS,
    describe_c_modules,
    is_library_source,
    library_folder,
)
from moe_bitnet.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DEFAULT_MAX_DOCUMENT_BYTES = 256 * 1024  # some 80,000 tokens: longer than any training sequence so far
_MIN_DOCUMENT_BYTES = 64
_SNIFFED_BYTES = 8192
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_UNPACKED_BYTES = 2**30  # of one compressed file: a small one may claim to hold any amount
_ALLOWED = "Pass UTF-8 text files (gzip is unpacked), Parquet files with a column of strings, or folders of them."


@dataclass(frozen=True)
class Corpus:
    """What :func:`collect_documents` found.

    Attributes:
        documents: distinct documents in the order in which they were found.
        num_skipped_files: files inside folders that were binary or could not be read.
        num_duplicates: documents dropped because an earlier one has the same text.
        source: where the text came from, in words.
    """

    documents: tuple[Document, ...]
    num_skipped_files: int
    num_duplicates: int
    source: str

    @property
    def num_bytes(self) -> int:
        """Size of all texts in UTF-8."""
        return sum(document.num_bytes for document in self.documents)


@dataclass
class _Tally:
    num_skipped_files: int = 0
    num_duplicates: int = 0

    def skip(self, what: object) -> None:
        self.num_skipped_files += 1
        logger.debug("skipped: %s", what)


def collect_documents(
    paths: Sequence[str | Path] = (),
    *,
    text_column: str | None = None,
    max_bytes: int | None = None,
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
) -> Corpus:
    """Collect the documents of ``paths``, or those of the standard library.

    The same files give the same documents in the same order.

    Args:
        paths: text files, Parquet files and folders (read recursively, in sorted order, without hidden
            entries). Empty: the standard library of the running interpreter.
        text_column: the Parquet column to read; by default the one named ``text``, or else the only
            column of strings.
        max_bytes: keep at most this many bytes, sampled as :func:`cluster.training.document.sample_documents` does.
        max_document_bytes: cut longer texts at line ends; at least 64.
    Returns:
        The documents, and counts of what was left out.
    Raises:
        ConfigError: a limit is too small.
        DataError: a path is missing, unreadable, binary or empty, or a Parquet file is damaged or has no
            column of strings.
    """
    if max_document_bytes < _MIN_DOCUMENT_BYTES:
        raise ConfigError(
            f"collect_documents: max_document_bytes is {max_document_bytes}. Pass at least {_MIN_DOCUMENT_BYTES}."
        )
    tally = _Tally()
    found: Iterator[Document]
    if paths:
        source = ", ".join(_printable(path) for path in paths)
        found = (document for path in paths for document in _read_path(Path(path), text_column, tally))
    else:
        source = f"Python {platform.python_version()} standard library"
        found = _read_standard_library(tally)
    pieces = (piece for document in found for piece in cut_document(document, max_document_bytes))
    distinct = _drop_duplicates(pieces, tally)
    documents = tuple(distinct) if max_bytes is None else tuple(sample_documents(distinct, max_bytes))
    if not documents:
        raise DataError(f"No text is left of {source} within max_bytes={max_bytes}. Pass a larger limit or more text.")
    corpus = Corpus(documents, tally.num_skipped_files, tally.num_duplicates, source)
    logger.info(
        "%s: %d documents, %.1f MB, %d duplicates dropped, %d files skipped",
        source,
        len(documents),
        corpus.num_bytes / 1e6,
        corpus.num_duplicates,
        corpus.num_skipped_files,
    )
    return corpus


def _drop_duplicates(documents: Iterable[Document], tally: _Tally) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        if not document.text.strip():
            continue
        key = content_hash(document, purpose=b"duplicate")
        if key in seen:
            tally.num_duplicates += 1
            continue
        seen.add(key)
        yield document


# --- Files and folders ------------------------------------------------------------------------------------------


def _read_path(path: Path, text_column: str | None, tally: _Tally) -> Iterator[Document]:
    """Yield the documents of a path that the user named: what cannot be read is an error."""
    try:
        if not path.exists():
            raise DataError(f"{_printable(path)} does not exist. {_ALLOWED}")
        if path.is_dir():
            documents = _read_folder(path, tally, label=path.resolve().name, text_column=text_column)
        else:
            documents = _read_file(path, _printable(path), text_column)
    except OSError as error:
        raise DataError(f"{_printable(path)} cannot be reached ({error.strerror}). {_ALLOWED}") from error
    is_empty = True
    num_skipped_before = tally.num_skipped_files
    for document in documents:
        is_empty = False
        yield document
    if is_empty:
        num_skipped = tally.num_skipped_files - num_skipped_before
        detail = f" ({num_skipped} files in it are binary or unreadable)" if num_skipped else ""
        raise DataError(f"{_printable(path)} holds no text{detail}. {_ALLOWED}")


def _read_folder(
    folder: Path,
    tally: _Tally,
    *,
    label: str,
    text_column: str | None = None,
    is_wanted: Callable[[str], bool] = lambda name: True,
    skipped_folders: frozenset[str] = frozenset(),
) -> Iterator[Document]:
    """Yield the documents below ``folder`` in sorted order; what cannot be read is counted and left out."""
    for parent, folders, files in os.walk(folder, onerror=tally.skip):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and name != "__pycache__" and name not in skipped_folders
        )
        for file in sorted(files):
            if file.startswith(".") or not is_wanted(file):
                continue
            path = Path(parent, file)
            try:
                # A Parquet file that is damaged in the middle keeps its rows before the damage.
                yield from _read_file(path, _printable(label / path.relative_to(folder)), text_column)
            except DataError as error:
                tally.skip(error)


def _read_file(path: Path, name: str, text_column: str | None) -> Iterator[Document]:
    """Yield the one document of a text file (none if it is blank) or the rows of a Parquet file."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, name, text_column)
        return
    text = _read_text(path)
    if text.strip():
        yield Document(name, text)


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # a pipe or a device would wait for ever
            raise DataError(f"{_printable(path)} is neither a file nor a folder. {_ALLOWED}")
        with path.open("rb") as file:
            data = file.read(_SNIFFED_BYTES)
            if data.startswith(_GZIP_MAGIC):
                file.seek(0)
                data = _unpack(path, file)
            elif b"\0" not in data:
                data += file.read()
    except OSError as error:
        raise DataError(f"{_printable(path)} cannot be read ({error.strerror}). {_ALLOWED}") from error
    if b"\0" in data:
        raise DataError(f"{_printable(path)} is binary, not text. {_ALLOWED}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{_printable(path)} is not UTF-8 at byte {error.start}. {_ALLOWED}") from error


def _unpack(path: Path, file: BinaryIO) -> bytes:
    try:
        with gzip.open(file) as unpacked:
            data = unpacked.read(_MAX_UNPACKED_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{_printable(path)} is not a whole gzip file ({error}). Copy it again.") from error
    if len(data) > _MAX_UNPACKED_BYTES:
        raise DataError(
            f"{_printable(path)} unpacks to more than {_MAX_UNPACKED_BYTES // 2**20} MiB. Unpack and divide it."
        )
    return data


def _read_parquet(path: Path, name: str, text_column: str | None) -> Iterator[Document]:
    """Yield a document for each row; rows that are null or blank are left out."""
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = _choose_column(path, file.schema_arrow, text_column)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is not None and text.strip():
                        yield Document(f"{name}#{row}", text)
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{_printable(path)} is not a whole Parquet file ({error}). Write or download it again."
        ) from error


def _choose_column(path: Path, schema: Any, text_column: str | None) -> str:
    columns: list[str] = [field.name for field in schema if _is_string(field.type)]
    if text_column is None and "text" in columns:
        return "text"
    if text_column is None and len(columns) == 1:
        return columns[0]
    if text_column is not None and text_column in columns:
        return text_column
    problem = (
        f"no column of strings named {text_column!r}"
        if text_column is not None
        else "no column of strings"
        if not columns
        else "several columns of strings, none of them named 'text'"
    )
    advice = f"Choose one of {columns} with --text-column." if columns else "Write the texts as a column of strings."
    raise DataError(f"{_printable(path)} has {problem}. {advice}")


def _is_string(kind: Any) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _printable(path: str | Path) -> str:
    """Return ``path`` with ``/`` between its parts; bytes that are no UTF-8 are replaced."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "replace")


def _read_standard_library(tally: _Tally) -> Iterator[Document]:
    yield from _read_folder(
        library_folder(), tally, label="stdlib", is_wanted=is_library_source, skipped_folders=FOREIGN_FOLDERS
    )
    yield from describe_c_modules()
