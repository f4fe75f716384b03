import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.training.corpus import collect_documents
from moe_bitnet.errors import ConfigError, DataError


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def names(corpus):
    return [document.name for document in corpus.documents]


def texts(corpus):
    return [document.text for document in corpus.documents]


@pytest.fixture
def folder(tmp_path):
    """Text of several kinds, nested; a binary file, a broken link, hidden and empty files."""
    root = tmp_path / "library"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "__pycache__").mkdir()
    (root / "z.txt").write_text("last\n")
    (root / "a.md").write_text("# première 👍\n", encoding="utf-8")
    (root / "b" / "c.py").write_text("x = 1\n")
    (root / "b" / "copy.py").write_text("x = 1\n")
    (root / "b" / "empty.py").write_text(" \n")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "broken").symlink_to(root / "nowhere")
    (root / ".git" / "config").write_text("hidden")
    (root / "__pycache__" / "c.pyc").write_bytes(b"\0")
    return root


def test_a_folder_is_read_recursively_in_sorted_order(folder):
    corpus = collect_documents([folder])
    assert names(corpus) == ["library/a.md", "library/z.txt", "library/b/c.py"]
    assert texts(corpus) == ["# première 👍\n", "last\n", "x = 1\n"]
    assert corpus.num_bytes == sum(len(text.encode()) for text in texts(corpus))
    assert corpus == collect_documents([folder])


def test_binary_and_unreadable_files_in_a_folder_are_counted(folder):
    corpus = collect_documents([folder])
    assert corpus.num_skipped_files == 3  # image.png, latin.txt, broken
    assert corpus.num_duplicates == 1  # copy.py


def test_a_pipe_in_a_folder_is_skipped_and_not_waited_for(folder):
    os.mkfifo(folder / "pipe")
    assert collect_documents([folder]).num_skipped_files == 4
    with pytest.raises(DataError, match="neither a file nor a folder"):
        collect_documents([folder / "pipe"])


def test_exact_duplicates_across_paths_are_dropped(folder):
    corpus = collect_documents([folder / "z.txt", folder, folder / "z.txt"])
    assert texts(corpus).count("last\n") == 1
    assert corpus.num_duplicates == 3


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert texts(collect_documents([tmp_path / "bom.txt"])) == ["hello\r\n"]


def test_a_file_name_that_is_no_utf8_gets_a_printable_name(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"hello")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    [name] = names(collect_documents([tmp_path]))
    assert name.endswith("/caf\ufffd.txt")
    name.encode("utf-8")


def test_parquet_rows_become_documents(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", text=["one", None, " ", "two"], other=["x", "y", "z", "w"])
    corpus = collect_documents([path])
    assert texts(corpus) == ["one", "two"]
    assert [name.rsplit("/")[-1] for name in names(corpus)] == ["rows.parquet#0", "rows.parquet#3"]
    assert texts(collect_documents([path], text_column="other")) == ["x", "y", "z", "w"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_the_only_column_of_strings_is_taken(tmp_path, kind):
    path = write_parquet(tmp_path / "rows.parquet", number=[1, 2], body=pa.array(["one", "two"]).cast(kind))
    assert texts(collect_documents([path])) == ["one", "two"]


def test_parquet_inside_a_folder_is_read(folder):
    write_parquet(folder / "rows.parquet", text=["row"])
    write_parquet(folder / "numbers.parquet", number=[1])
    corpus = collect_documents([folder])
    assert "library/rows.parquet#0" in names(corpus)
    assert corpus.num_skipped_files == 4


def test_parquet_without_a_clear_column_of_strings_is_refused(tmp_path):
    path = write_parquet(tmp_path / "n.parquet", number=[1])
    with pytest.raises(DataError, match="no column of strings"):
        collect_documents([path])
    path = write_parquet(tmp_path / "two.parquet", title=["a"], body=["b"])
    with pytest.raises(DataError, match=r"several columns.*\['title', 'body'\] with --text-column"):
        collect_documents([path])
    with pytest.raises(DataError, match="no column of strings named 'txt'"):
        collect_documents([path], text_column="txt")


def test_damaged_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", text=["one two three"] * 100)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not parquet at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a whole Parquet file"):
            collect_documents([path])


def test_a_path_that_cannot_be_used_is_an_error_that_names_it(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, problem in [
        (tmp_path / "nowhere", "does not exist"),
        (folder / "image.png", "is binary"),
        (folder / "latin.txt", "not UTF-8 at byte 3"),
        (folder / "b" / "empty.py", "holds no text"),
        (folder / "__pycache__", r"holds no text \(1 files"),
        (empty, "holds no text"),
    ]:
        with pytest.raises(DataError, match=problem) as caught:
            collect_documents([folder / "z.txt", path])
        assert path.name in str(caught.value)
        assert "Pass " in str(caught.value)


def test_an_unreadable_file_is_refused_and_skipped_in_a_folder(folder, monkeypatch):
    open_path = Path.open

    def deny(path, *arguments, **keywords):
        if path.name == "z.txt":
            raise PermissionError(13, "Permission denied")
        return open_path(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(DataError, match=r"z\.txt cannot be read \(Permission denied\)"):
        collect_documents([folder / "z.txt"])
    assert collect_documents([folder]).num_skipped_files == 4


def test_long_texts_are_cut_at_line_ends(tmp_path):
    lines = [f"line {number}\n" for number in range(50)]
    (tmp_path / "long.txt").write_text("".join(lines))
    corpus = collect_documents([tmp_path], max_document_bytes=64)
    assert "".join(texts(corpus)) == "".join(lines)
    assert all(text.endswith("\n") and len(text) <= 64 for text in texts(corpus))
    assert names(corpus)[:2] == [f"{tmp_path.name}/long.txt#0", f"{tmp_path.name}/long.txt#1"]


def test_a_cap_below_one_document_cuts_it(tmp_path):
    (tmp_path / "a.txt").write_text("first line\nsecond line\n")
    assert texts(collect_documents([tmp_path], max_bytes=15)) == ["first line\n"]


def test_impossible_limits_are_refused(folder):
    with pytest.raises(ConfigError, match="at least 64"):
        collect_documents([folder], max_document_bytes=3)
    with pytest.raises(ConfigError, match="at least 1"):
        collect_documents([folder], max_bytes=0)
    (folder / "wide.txt").write_text("👍")
    with pytest.raises(DataError, match="No text is left"):
        collect_documents([folder / "wide.txt"], max_bytes=1)


def test_the_standard_library_is_the_default(monkeypatch, tmp_path):
    """On a small stand-in: the whole library takes a second to read."""
    for name in ("os.py", "json/decoder.py", "site-packages/x.py", "_sysconfigdata__linux.py", "json/data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = collect_documents()
    sources = [name for name in names(corpus) if name.startswith("stdlib/")]
    assert sources == ["stdlib/os.py", "stdlib/json/decoder.py"]
    assert "docstrings/math" in names(corpus)
    assert "standard library" in corpus.source


def test_gzip_files_are_unpacked(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("première\n".encode()))
    (tmp_path / "b").write_bytes(gzip.compress(b"two\n"))  # judged by its content
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"\0binary"))
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"cut off" * 99)[:-5])
    corpus = collect_documents([tmp_path])
    assert texts(corpus) == ["première\n", "two\n"]
    assert corpus.num_skipped_files == 2
    with pytest.raises(DataError, match="not a whole gzip file"):
        collect_documents([tmp_path / "d.gz"])


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.training.corpus._MAX_UNPACKED_BYTES", 1024)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a" * 1025))
    with pytest.raises(DataError, match="unpacks to more than"):
        collect_documents([tmp_path / "bomb.gz"])
