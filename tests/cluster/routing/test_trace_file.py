from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.routing import trace_file
from cluster.routing.trace import RoutingTrace
from cluster.routing.trace_file import TraceWriter, read_trace, write_trace
from moe_bitnet.errors import DataError


def trace_of(num_tokens: int, num_experts: int = 9) -> RoutingTrace:
    noise = np.random.default_rng(num_tokens).random((num_tokens, 3, num_experts))
    return RoutingTrace(noise.argsort(axis=-1)[..., :2], num_experts)


def writer_to(path: Path) -> TraceWriter:
    return TraceWriter(path, num_experts=9, num_layers=3, top_k=2)


@pytest.mark.parametrize("num_tokens", [1, 7, 33])
@pytest.mark.parametrize("num_experts", [9, 40_000])
def test_a_trace_survives_its_file(tmp_path: Path, num_tokens: int, num_experts: int) -> None:
    choices = np.arange(num_tokens * 6).reshape(num_tokens, 3, 2) % num_experts
    trace = RoutingTrace(choices, num_experts) if num_experts > 9 else trace_of(num_tokens)
    write_trace(tmp_path / "new" / "trace.parquet", trace)
    again = read_trace(tmp_path / "new" / "trace.parquet")
    assert np.array_equal(again.expert_indices, trace.expert_indices)
    assert again.expert_indices.dtype == trace.expert_indices.dtype
    assert again.num_experts == trace.num_experts
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace.parquet"]


def test_a_long_run_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "ROW_GROUP_TOKENS", 8)
    whole = trace_of(45)
    with writer_to(tmp_path / "t.parquet") as writer:
        for start, stop in ((0, 1), (1, 1), (1, 20), (20, 45)):
            writer.append(whole.expert_indices[start:stop])
        assert len(writer._waiting) == 0  # nothing that fills a row group stays in memory
    assert writer.num_tokens == 45
    assert pq.ParquetFile(tmp_path / "t.parquet").metadata.num_row_groups > 1
    assert np.array_equal(read_trace(tmp_path / "t.parquet").expert_indices, whole.expert_indices)


def test_the_callers_array_may_change_after_appending(tmp_path: Path) -> None:
    block = trace_of(4).expert_indices.copy()
    expected = block.copy()
    with writer_to(tmp_path / "t.parquet") as writer:
        writer.append(block)
        block[:] = 0
    assert np.array_equal(read_trace(tmp_path / "t.parquet").expert_indices, expected)


def test_a_broken_run_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_trace(path, trace_of(5))

    def record_and_fail() -> None:
        with writer_to(path) as writer:
            writer.append(trace_of(30).expert_indices)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record_and_fail()
    with pytest.raises(DataError, match="no token was recorded"), writer_to(path):
        pass
    assert read_trace(path).num_tokens == 5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (np.zeros((2, 3), int), r"\[2, 3\]"),
        (np.zeros((2, 2, 2), int), r"\[num_tokens, 3, 2\]"),
        (np.zeros((1, 3, 2)), "float64"),
        (np.full((1, 3, 2), 9), "range from 9 to 9"),
        (np.ones((1, 3, 2), int), "twice"),
    ],
)
def test_wrong_blocks_are_refused(tmp_path: Path, block: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message), writer_to(tmp_path / "t.parquet") as writer:
        writer.append(block)
    assert not list(tmp_path.iterdir())


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="top_k is 0"):
        TraceWriter(tmp_path / "t.parquet", num_experts=3, num_layers=1, top_k=0)


def test_a_trace_larger_than_allowed_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    write_trace(path, trace_of(33))  # 33 · 3 · 2 int16
    assert read_trace(path, max_bytes=396).num_tokens == 33
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(DataError, match="33 tokens need 396 B, allowed are 395 B"):
        read_trace(path, max_bytes=395)


METADATA = {"moe_bitnet.format": "routing_trace", "num_experts": "9", "num_layers": "1", "top_k": "2"}
PAIRS = pa.array([[0, 1], [3, 2]], pa.list_(pa.int16(), 2))


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        ({"layer_0": PAIRS}, {}, "no routing trace"),
        ({"layer_0": PAIRS}, {"moe_bitnet.format": "other"}, "no routing trace"),
        ({"layer_0": PAIRS}, {"num_experts": "-9"}, "no routing trace"),
        ({"layer_0": PAIRS}, {"num_experts": "99999999999"}, "no routing trace"),
        ({"layer_0": PAIRS}, {"num_experts": "1"}, "top 2 of 1 experts"),
        ({"layer_0": PAIRS}, {"num_layers": "2"}, "says 2 layers.*has 1 columns"),
        ({"layer_0": PAIRS}, {"top_k": "3"}, "lists of 3"),
        ({"layer_1": PAIRS}, {}, "its columns are layer_1"),
        ({"layer_0": pa.array([0, 1], pa.int16())}, {}, "its columns"),
        ({"layer_0": pa.array([[0, 1]], pa.list_(pa.int32(), 2))}, {}, "its columns"),
        ({"layer_0": PAIRS.slice(0, 0)}, {}, "holds no token"),
        ({"layer_0": pa.array([[0, 9]], PAIRS.type)}, {}, "range from 0 to 9"),
        ({"layer_0": pa.array([[0, 0]], PAIRS.type)}, {}, "twice"),
        ({"layer_0": pa.array([[0, 1], None], PAIRS.type)}, {}, "missing values"),
        ({"layer_0": pa.array([[0, None]], PAIRS.type)}, {}, "missing values"),
    ],
)
def test_other_files_are_refused_with_their_fault(
    tmp_path: Path, columns: dict[str, pa.Array], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "t.parquet"
    all_metadata = {**METADATA, **metadata} if metadata or "no routing trace" not in message else {}
    pq.write_table(pa.table(columns).replace_schema_metadata(all_metadata), path)
    with pytest.raises(DataError, match=rf"t\.parquet: .*{message}"):
        read_trace(path)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(path)
    write_trace(path, trace_of(33))
    whole = path.read_bytes()
    for damaged in (b"", b"no parquet at all", whole[: len(whole) // 2], whole[:200] + b"\0" * 200 + whole[400:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"t\.parquet"):
            read_trace(path)
