import dataclasses
import json
import subprocess
import sys
import tempfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.training.document import Document
from cluster.training.shards import (
    build_shards,
    data_fingerprint,
    load_tokens,
    read_summary,
    split_documents,
    train_tokenizer,
)
from cluster.training.token_array import fill_tokens
from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.tokenizer import END_OF_TEXT, Tokenizer

DOCUMENTS = [
    Document(f"file {index}.py", f"def function_{index}(first, second):\n    return first * {index} + second  # é👍\n")
    for index in range(101)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=300)


@pytest.fixture
def built(tokenizer, tmp_path):
    folder = tmp_path / "shards"
    summary = build_shards(DOCUMENTS, tokenizer, folder, 0.2, source="a test", tokens_per_shard=700)
    return folder, summary


def rewrite(path, **columns):
    pq.write_table(pa.table(columns), path)


def texts_of(tokens, tokenizer):
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    return [tokenizer.decode(part[part != tokenizer.end_of_text_id]) for part in np.split(tokens, ends + 1)[:-1]]


# --- Splitting and building


def test_the_split_depends_on_the_text_alone():
    train, validation = split_documents(DOCUMENTS, 0.2)
    assert [*train, *validation] != DOCUMENTS
    assert set(train) | set(validation) == set(DOCUMENTS)
    assert 8 < len(validation) < 35
    renamed = [Document("other", document.text) for document in reversed(DOCUMENTS[:50])]
    in_validation = {document.text for document in validation}
    for document in split_documents(renamed, 0.2)[1]:
        assert document.text in in_validation
    assert split_documents(DOCUMENTS, 0.2, seed=1)[1] != validation


def test_equal_texts_stay_on_one_side():
    twins = [Document(f"twin {number}", document.text) for document in DOCUMENTS for number in range(2)]
    train, validation = split_documents(twins, 0.3)
    assert not {document.text for document in train} & {document.text for document in validation}


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("num_documents", [2, 3, 7])
def test_neither_side_is_empty(fraction, num_documents):
    train, validation = split_documents(DOCUMENTS[:num_documents], fraction)
    assert train
    assert validation


def test_a_split_that_cannot_be_made_is_refused():
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="validation_fraction"):
            split_documents(DOCUMENTS, fraction)
    for documents in ([], DOCUMENTS[:1], [DOCUMENTS[0]] * 3):
        with pytest.raises(DataError, match="Pass more files"):
            split_documents(documents, 0.5)


def test_loaded_tokens_decode_to_every_document(built, tokenizer):
    folder, summary = built
    train, validation = split_documents(DOCUMENTS, 0.2)
    for split, documents, num_tokens in [
        ("train", train, summary.num_train_tokens),
        ("validation", validation, summary.num_validation_tokens),
    ]:
        tokens = load_tokens(folder, split)
        assert tokens.dtype == np.int32
        assert len(tokens) == num_tokens
        assert texts_of(tokens, tokenizer) == [document.text for document in documents]


def test_shards_are_parquet_with_a_row_for_each_document(built, tokenizer):
    folder, summary = built
    paths = sorted(folder.glob("train-*.parquet"))
    assert [path.name for path in paths[:2]] == ["train-00000.parquet", "train-00001.parquet"]
    table = pa.concat_tables(pq.read_table(path) for path in paths)
    assert table.schema.names == ["name", "token_ids"]
    assert table.schema.field("token_ids").type == pa.list_(pa.uint16())
    train, _ = split_documents(DOCUMENTS, 0.2)
    assert table["name"].to_pylist() == [document.name for document in train]
    assert table["token_ids"][0].as_py() == tokenizer.encode(train[0].text)
    assert table.num_rows == summary.num_train_documents


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    class WideTokenizer:
        vocab_size, end_of_text_id = 70_000, 0

        def encode_batch(self, texts):
            return [[1, 69_999] for _ in texts]

        def save(self, path):
            path.write_text("{}")

    build_shards(DOCUMENTS[:5], WideTokenizer(), tmp_path / "wide", 0.3)
    assert pq.read_schema(tmp_path / "wide" / "train-00000.parquet").field("token_ids").type == pa.list_(pa.int32())
    assert load_tokens(tmp_path / "wide", "train")[:3].tolist() == [1, 69_999, 0]


def test_the_summary_counts_what_was_written(built):
    folder, summary = built
    train, validation = split_documents(DOCUMENTS, 0.2)
    assert read_summary(folder) == summary
    assert (summary.num_train_documents, summary.num_validation_documents) == (len(train), len(validation))
    assert summary.train_bytes == sum(len(document.text.encode()) for document in train)
    assert summary.bytes_per_token == summary.validation_bytes / summary.num_validation_tokens
    assert summary.source == "a test"
    assert summary.vocab_size == Tokenizer.load(folder / "tokenizer.json").vocab_size == 300


def test_building_again_gives_the_same_bytes(built, tokenizer, tmp_path):
    folder, _ = built
    build_shards(DOCUMENTS, tokenizer, tmp_path / "again", 0.2, source="a test", tokens_per_shard=700)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_the_end_of_text_inside_a_document_does_not_end_it(tokenizer, tmp_path):
    documents = [Document("a", f"one {END_OF_TEXT} two"), Document("b", "three")]
    build_shards(documents, tokenizer, tmp_path / "shards", 0.5)
    loaded = [
        text
        for split in ("train", "validation")
        for text in texts_of(load_tokens(tmp_path / "shards", split), tokenizer)
    ]
    assert sorted(loaded) == sorted(document.text for document in documents)


def test_progress_ends_with_all_documents(tokenizer, tmp_path):
    calls = []
    build_shards(DOCUMENTS, tokenizer, tmp_path / "shards", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (101, 101)
    assert calls == sorted(calls)


def test_an_interruption_keeps_the_old_shards(built, tokenizer):
    folder, summary = built

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(DOCUMENTS[:9], tokenizer, folder, progress=interrupt)
    assert read_summary(folder) == summary
    assert len(load_tokens(folder, "train")) == summary.num_train_tokens
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert build_shards(DOCUMENTS[:9], tokenizer, folder) == read_summary(folder) != summary


def test_a_folder_of_something_else_is_not_replaced(tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(DataError, match="holds no shards, so it is not replaced"):
            build_shards(DOCUMENTS, tokenizer, folder)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(DataError, match="cannot be written"):
        build_shards(DOCUMENTS, tokenizer, tmp_path / "thesis.tex" / "shards")


def test_the_tokenizer_sample_is_capped():
    assert train_tokenizer(DOCUMENTS, 400, max_bytes=200).vocab_size < train_tokenizer(DOCUMENTS, 400).vocab_size


def test_long_splits_are_mapped_from_a_file_that_has_no_name(built, monkeypatch, tmp_path):
    in_memory = load_tokens(built[0], "train")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("cluster.training.shards.fill_tokens", partial(fill_tokens, max_in_memory=100))
    mapped = load_tokens(built[0], "train")
    assert isinstance(mapped, np.memmap)
    assert not any((tmp_path / "scratch").iterdir())
    np.testing.assert_array_equal(mapped, in_memory)
    assert data_fingerprint(mapped, mapped) == data_fingerprint(in_memory, in_memory)


# --- Reading what is damaged


def test_missing_parts_are_named(built):
    folder, _ = built
    with pytest.raises(DataError, match="no split 'test'"):
        load_tokens(folder, "test")
    (folder / "validation-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"validation-\*\.parquet|shards were lost"):
        load_tokens(folder, "validation")
    (folder / "train-00001.parquet").unlink()
    with pytest.raises(DataError, match="shards were lost"):
        load_tokens(folder, "train")
    with pytest.raises(DataError, match=r"no summary\.json"):
        load_tokens(folder / "nowhere", "train")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_shard_is_refused(built, keep):
    path = built[0] / "train-00000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"train-00000\.parquet is truncated or altered"):
        load_tokens(built[0], "train")


def test_a_flipped_bit_in_a_page_is_refused(built):
    path = built[0] / "train-00000.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = group.column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="truncated or altered"):
        load_tokens(built[0], "train")


@pytest.mark.parametrize(
    "columns",
    [
        {"token_ids": pa.array([[1]], pa.list_(pa.uint16()))},
        {"name": ["a"], "token_ids": pa.array([[1]], pa.list_(pa.int64()))},
        {"name": ["a"], "token_ids": pa.array([1], pa.uint16())},
        {"name": [1], "token_ids": pa.array([[1]], pa.list_(pa.int32()))},
    ],
)
def test_wrong_columns_are_refused(built, columns):
    rewrite(built[0] / "train-00000.parquet", **columns)
    with pytest.raises(DataError, match="has the columns"):
        load_tokens(built[0], "train")


def put_in_one_shard(built, rows, num_tokens):
    """Replace the training shards by one with ``rows``, and the summary's count to match."""
    folder, summary = built
    for path in folder.glob("train-*.parquet"):
        path.unlink()
    names = pa.array(["x"] * len(rows), pa.string())
    rewrite(folder / "train-00000.parquet", name=names, token_ids=pa.array(rows, pa.list_(pa.int32())))
    fields = dataclasses.asdict(summary) | {"num_train_tokens": num_tokens}
    (folder / "summary.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("token_id", [300, 2**31 - 1, -1])
def test_ids_beyond_the_vocabulary_are_refused(built, token_id):
    folder = put_in_one_shard(built, [[1, 2], [3, token_id]], num_tokens=6)
    with pytest.raises(DataError, match=f"token id {token_id}, but the vocabulary has 300"):
        load_tokens(folder, "train")


def test_an_empty_shard_is_refused(built):
    with pytest.raises(DataError, match="holds no documents"):
        load_tokens(put_in_one_shard(built, [], num_tokens=0), "train")


@pytest.mark.parametrize("row", [[], None, [None]])
def test_a_document_without_tokens_is_refused(built, row):
    with pytest.raises(DataError, match="without token ids"):
        load_tokens(put_in_one_shard(built, [[5], row], num_tokens=4), "train")


@pytest.mark.parametrize("num_tokens", [-1, 0, 5, 10**15])
def test_a_summary_that_counts_otherwise_is_refused(built, num_tokens):
    with pytest.raises(DataError, match="shards were lost"):
        load_tokens(put_in_one_shard(built, [[1, 2], [3, 4]], num_tokens), "train")


def test_shards_of_another_program_are_told_what_is_missing(built):
    folder, _ = built
    (folder / "summary.json").unlink()
    with pytest.raises(DataError, match=r"another program wrote them.*fields source, vocab_size"):
        load_tokens(folder, "train")


def test_a_corrupt_summary_is_refused(built):
    folder, summary = built
    good = dataclasses.asdict(summary)
    for content in (
        "",
        "{",
        "[]",
        "{}",
        json.dumps(good | {"extra": 1}),
        json.dumps(good | {"vocab_size": "300"}),
        json.dumps(good | {"vocab_size": True}),
        json.dumps(good | {"num_train_tokens": 2.5}),
        json.dumps(good | {"source": None}),
    ):
        (folder / "summary.json").write_text(content)
        with pytest.raises(DataError, match=r"summary\.json"):
            load_tokens(folder, "train")


def test_importing_the_data_modules_pulls_in_neither_ray_nor_deepspeed():
    code = "import cluster.training.batches, sys; assert not {'ray', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
