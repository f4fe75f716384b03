import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.training.document import Document, content_hash, cut_document, sample_documents
from moe_bitnet.errors import ConfigError, DataError


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("a\n é👍"), max_size=200), st.integers(4, 40))
def test_cut_pieces_fit_and_join_to_the_text(text, max_bytes):
    pieces = list(cut_document(Document("d", text), max_bytes))
    assert "".join(piece.text for piece in pieces) == text
    assert all(0 < piece.num_bytes <= max_bytes for piece in pieces) or text == ""


def test_a_byte_cap_is_filled_whatever_the_order():
    documents = [Document(f"{index:03d}", f"text {index}\n" * 10) for index in range(100)]
    chosen = sample_documents(documents, 2000)
    assert 1900 < sum(document.num_bytes for document in chosen) <= 2000
    assert [document.name for document in chosen] == sorted(document.name for document in chosen)
    shuffled = random.Random(1).sample(documents, k=100)
    assert {document.text for document in sample_documents(shuffled, 2000)} == {document.text for document in chosen}
    assert sample_documents(documents, 10**9) == documents


def test_a_byte_cap_samples_evenly_over_names():
    documents = [Document(f"{index:04d}", f"{index:04d}\n" * 5) for index in range(1000)]
    chosen = sample_documents(documents, 10_000)  # 400 of 1000
    first_half = sum(int(document.name) < 500 for document in chosen)
    assert 160 < first_half < 240


def test_a_sample_never_holds_an_empty_piece():
    assert sample_documents([Document("d", "👍")], 2) == []


def test_a_cap_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        sample_documents([Document("d", "text")], 0)


def test_hashes_of_different_purposes_are_independent():
    documents = [Document("d", str(index)) for index in range(400)]
    low = [d for d in documents if content_hash(d, b"sample")[0] < 128]
    assert 0.35 < sum(content_hash(d, b"split")[0] < 128 for d in low) / len(low) < 0.65
    assert content_hash(low[0], b"split", seed=0) != content_hash(low[0], b"split", seed=1)
    assert content_hash(Document("other name", low[0].text), b"split") == content_hash(low[0], b"split")


def test_a_lone_surrogate_names_its_document():
    with pytest.raises(DataError, match=r"'bad'.*lone surrogate"):
        content_hash(Document("bad", "\ud800"), b"split")
