"""One Parquet file of token ids: ``name: string, token_ids: list<uint16 | int32>``, a row a document.

Reading streams: some documents at a time, so that a file of any length fits. Every row is checked, and what is wrong
becomes one error that names the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from cluster.training.token_array import Tokens
from moe_bitnet.errors import DataError

REBUILD = "Build the shards again."
_ROW_GROUP_ROWS = 1024
_READ_ROWS = 64  # documents held while reading; those of our own builder are at most 256 KiB of text each


def write_shard(path: Path, names: list[str], rows: list[npt.NDArray[np.int32]], vocab_size: int) -> None:
    """Write documents as a Parquet file.

    Args:
        path: where to.
        names: of the documents.
        rows: token ids of each document, none of them empty.
        vocab_size: V; ids take 16 bits up to 65,536.
    """
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    token_ids = pyarrow.ListArray.from_arrays(offsets, np.concatenate(rows).astype(dtype))
    table = pyarrow.table({"name": pyarrow.array(names, pyarrow.string()), "token_ids": token_ids})
    # Checksums turn a flipped bit into an error; without them it would be another token.
    pyarrow.parquet.write_table(
        table, path, compression="zstd", row_group_size=_ROW_GROUP_ROWS, write_page_checksum=True
    )


def count_tokens(path: Path) -> int:
    """Return the tokens of a file, an end of text for each document included, from its footer alone.

    Raises:
        DataError: the file is truncated or empty, or has other columns.
    """
    with _open(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        columns = [group.column(index) for group in groups for index in range(group.num_columns)]
        num_values = sum(column.num_values for column in columns if column.path_in_schema.startswith("token_ids."))
        return int(num_values + metadata.num_rows)


def read_shard(path: Path, vocab_size: int, end_of_text_id: int) -> Iterator[Tokens]:
    """Yield the tokens of a file, some documents at a time, an end of text after each document.

    Raises:
        DataError: the file is truncated, altered or empty, has other columns, a document without ids, or an id
            that is not below ``vocab_size``.
    """
    with _open(path) as file:
        for batch in file.iter_batches(batch_size=_READ_ROWS, columns=["token_ids"]):
            yield _flatten(path, batch.column(0), vocab_size, end_of_text_id)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Yield a checked Parquet file; damage that shows while it is read becomes a DataError."""
    try:
        # read ahead by buffers of 1 MiB, not by whole columns of a row group
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True, buffer_size=2**20) as file:
            _check_columns(path, file.schema_arrow)
            if file.metadata.num_rows == 0:
                raise DataError(f"The shard {path} holds no documents. {REBUILD}")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"The shard {path} is truncated or altered ({error}). {REBUILD}") from error


def _flatten(path: Path, rows: Any, vocab_size: int, end_of_text_id: int) -> Tokens:
    lengths = rows.value_lengths()
    flat = rows.flatten()
    if rows.null_count or flat.null_count or 0 in lengths.to_numpy():
        raise DataError(f"The shard {path} holds a document without token ids. {REBUILD}")
    values = flat.to_numpy().astype(np.int32)
    if not 0 <= values.min() <= values.max() < vocab_size:
        wrong = values.min() if values.min() < 0 else values.max()
        raise DataError(
            f"The shard {path} holds token id {wrong}, but the vocabulary has {vocab_size} tokens "
            f"(0 to {vocab_size - 1}). {REBUILD}"
        )
    with_ends: Tokens = np.insert(values, np.cumsum(lengths.to_numpy()), end_of_text_id)
    return with_ends


def _check_columns(path: Path, schema: Any) -> None:
    types = {field.name: field.type for field in schema}
    allowed = (pyarrow.list_(pyarrow.uint16()), pyarrow.list_(pyarrow.int32()))
    if types.get("name") != pyarrow.string() or types.get("token_ids") not in allowed:
        found = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise DataError(
            f"The shard {path} has the columns ({found}), not (name: string, token_ids: list<uint16 or int32>). "
            f"{REBUILD}"
        )
