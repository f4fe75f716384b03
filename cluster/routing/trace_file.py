"""Routing traces as Parquet files: written block by block, read back whole after their sizes were checked.

    layer_0                 layer_1               ...     one row for each token
    fixed_size_list[K]      fixed_size_list[K]            expert ids, int16 or int32

Column per layer, so that other tools read one layer without the rest. The schema's metadata says
``moe_bitnet.format = routing_trace``, ``num_experts``, ``num_layers`` and ``top_k``.
A file is complete or absent: it is written beside its target and renamed at the end.
"""

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.routing.trace import IntArray, RoutingTrace, check_choices, index_dtype
from moe_bitnet.errors import DataError
from moe_bitnet.units import format_bytes

_FORMAT_KEY, _FORMAT = b"moe_bitnet.format", b"routing_trace"
_SIZES = ("num_experts", "num_layers", "top_k")

ROW_GROUP_TOKENS = 8192
DEFAULT_MAX_BYTES = 4 * 10**9


class TraceWriter:
    """Writes a trace that may be longer than memory; use it as a context manager.

    Leaving the block without an exception completes the file; with one, nothing is left behind.

    Args:
        path: the Parquet file; one that is there is replaced at the end.
        num_experts: E.
        num_layers: L.
        top_k: K.
    Raises:
        DataError: a size below 1, or at the end no token.
    """

    def __init__(self, path: Path, *, num_experts: int, num_layers: int, top_k: int) -> None:
        sizes = {"num_experts": num_experts, "num_layers": num_layers, "top_k": top_k}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise DataError(f"TraceWriter: {name} is {size!r}; give an integer of at least 1.")
        self._path = path
        self._num_experts, self._shape = num_experts, (num_layers, top_k)
        self._schema = _schema(**sizes)
        self._waiting: list[IntArray] = []
        self._num_waiting = 0
        self.num_tokens = 0
        """Tokens appended so far."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
        self._file = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")

    def append(self, expert_indices: IntArray) -> None:
        """Add tokens.

        Args:
            expert_indices: ``[num_tokens, num_layers, top_k]`` integers; copied. May hold no token.
        Raises:
            DataError: another shape or type, or experts that cannot be.
        """
        if expert_indices.ndim != 3 or expert_indices.shape[1:] != self._shape or expert_indices.dtype.kind not in "iu":
            raise DataError(
                f"{self._path}: expert_indices is {expert_indices.dtype} {list(expert_indices.shape)}; "
                f"give integers [num_tokens, {self._shape[0]}, {self._shape[1]}]."
            )
        if len(expert_indices) == 0:
            return
        check_choices(expert_indices, self._num_experts)
        self._waiting.append(expert_indices.astype(index_dtype(self._num_experts)))
        self._num_waiting += len(expert_indices)
        self.num_tokens += len(expert_indices)
        if self._num_waiting >= ROW_GROUP_TOKENS:
            self._flush()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
            self._file.close()
            if error is None:
                self._complete()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _complete(self) -> None:
        if self.num_tokens == 0:
            raise DataError(f"{self._path}: no token was recorded, so no trace was written. Run the model first.")
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self._path)

    def _flush(self) -> None:
        if not self._waiting:
            return
        block = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        columns = [
            pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(block[:, layer]).ravel(), self._shape[1])
            for layer in range(self._shape[0])
        ]
        self._file.write_table(pa.table(columns, schema=self._schema), row_group_size=ROW_GROUP_TOKENS)


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write a whole trace to ``path``, completely or not at all."""
    sizes = {"num_experts": trace.num_experts, "num_layers": trace.num_layers, "top_k": trace.top_k}
    with TraceWriter(path, **sizes) as writer:
        for start in range(0, trace.num_tokens, ROW_GROUP_TOKENS):
            writer.append(trace.expert_indices[start : start + ROW_GROUP_TOKENS])


def read_trace(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> RoutingTrace:
    """Read a trace.

    Args:
        path: a Parquet file of this module.
        max_bytes: the largest trace to take into memory; checked against the file's own sizes before any of it
            is read.
    Raises:
        DataError: no such file or another kind of file, columns or sizes that contradict each other, no token,
            impossible experts, or more bytes than allowed.
    """
    try:
        with pq.ParquetFile(path) as file:
            return _read(file, path, max_bytes)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Give a routing trace.") from error


def _read(file: pq.ParquetFile, path: Path, max_bytes: int) -> RoutingTrace:
    schema, num_tokens = file.schema_arrow, file.metadata.num_rows
    sizes = _read_sizes(schema, path)
    if not schema.equals(_schema(**sizes)):
        raise DataError(
            f"{path}: its columns are {', '.join(schema.names[:4]) or 'none'}{', ...' if len(schema) > 4 else ''}, not "
            f"layer_0 to layer_{sizes['num_layers'] - 1} with lists of {sizes['top_k']} expert ids as its metadata "
            f"says. Record the trace again."
        )
    if num_tokens == 0:
        raise DataError(f"{path}: holds no token. Record the trace again.")
    dtype = np.dtype(index_dtype(sizes["num_experts"]))
    needed_bytes = num_tokens * sizes["num_layers"] * sizes["top_k"] * dtype.itemsize
    if needed_bytes > max_bytes:
        raise DataError(
            f"{path}: its {num_tokens} tokens need {format_bytes(needed_bytes)}, allowed are "
            f"{format_bytes(max_bytes)}. Raise max_bytes, or record fewer tokens."
        )
    expert_indices = np.empty((num_tokens, sizes["num_layers"], sizes["top_k"]), dtype)
    start = 0
    for batch in file.iter_batches(batch_size=ROW_GROUP_TOKENS):
        if start + len(batch) > num_tokens:
            break  # told below
        for layer, column in enumerate(batch.columns):
            values = column.flatten()
            if column.null_count or values.null_count:
                raise DataError(f"{path}: layer_{layer} has missing values. Record the trace again.")
            block = values.to_numpy(zero_copy_only=False).reshape(len(batch), sizes["top_k"])
            expert_indices[start : start + len(batch), layer] = block
        start += len(batch)
    if start != num_tokens:
        raise DataError(f"{path}: does not hold the {num_tokens} tokens that it says. Record the trace again.")
    try:
        return RoutingTrace(expert_indices, sizes["num_experts"])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _schema(num_experts: int, num_layers: int, top_k: int) -> pa.Schema:
    values = pa.list_(pa.from_numpy_dtype(index_dtype(num_experts)), top_k)
    metadata = {_FORMAT_KEY: _FORMAT, b"num_experts": b"%d" % num_experts}
    metadata |= {b"num_layers": b"%d" % num_layers, b"top_k": b"%d" % top_k}
    return pa.schema([(f"layer_{layer}", values) for layer in range(num_layers)], metadata)


def _read_sizes(schema: pa.Schema, path: Path) -> dict[str, int]:
    metadata = schema.metadata or {}
    texts = {name: metadata.get(name.encode(), b"") for name in _SIZES}
    is_trace = metadata.get(_FORMAT_KEY) == _FORMAT
    if not is_trace or not all(text.isdigit() and 1 <= len(text) <= 9 and int(text) > 0 for text in texts.values()):
        raise DataError(
            f"{path}: is Parquet, but no routing trace: its metadata lacks {_FORMAT_KEY.decode()} = "
            f"{_FORMAT.decode()}, or one of {', '.join(_SIZES)}. Record one with TraceRecorder."
        )
    sizes = {name: int(text) for name, text in texts.items()}
    if sizes["num_layers"] != len(schema) or sizes["top_k"] > sizes["num_experts"]:
        raise DataError(
            f"{path}: its metadata says {sizes['num_layers']} layers and top {sizes['top_k']} of "
            f"{sizes['num_experts']} experts; it has {len(schema)} columns. Record the trace again."
        )
    return sizes
