import json
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, Tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n" * 3,
    "for first in range(10):\n    print(first, 'naïve café')\n" * 3,
    "The return of the first range: return first, then second.\n" * 3,
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=300)


@settings(deadline=None, max_examples=200)
@given(st.text())
@example("")
@example("\0\x01\x1b[31m\x7f\x85\u2028\ufeff\r\n\t  \n")
@example("👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 e\u0301 \U0010ffff 漢字 עברית")
@example(END_OF_TEXT)
@example(" leading, trailing  \n\n   return  ")
@example("ĠĊ Ġreturn")  # what the byte-level alphabet shows for a space and a newline
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=50)
@given(st.text(), st.text())
def test_text_never_encodes_to_the_end_of_text(tokenizer, before, after):
    text = before + END_OF_TEXT + after
    assert tokenizer.end_of_text_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_on_the_end_of_text_spelled_out_keeps_it_special():
    tokenizer = Tokenizer.train([f"a {END_OF_TEXT} b " * 50], vocab_size=300)
    assert tokenizer.end_of_text_id == 0
    assert 0 not in tokenizer.encode(END_OF_TEXT)


def test_encode_batch_equals_encode(tokenizer):
    texts = [*TEXTS, "", "👍", END_OF_TEXT]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_training_is_deterministic_in_any_order():
    again = Tokenizer.train(reversed(TEXTS), vocab_size=300)
    assert again.to_json() == Tokenizer.train(TEXTS, vocab_size=300).to_json()


def test_merges_make_frequent_words_short(tokenizer):
    assert len(tokenizer.encode(" return")) < len(" return") / 2
    assert tokenizer.vocab_size == 300
    assert max(max(tokenizer.encode(text)) for text in TEXTS) < 300


def test_ids_start_with_the_end_of_text_and_the_bytes():
    tokenizer = Tokenizer.train([], vocab_size=300)
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE == 257
    assert sorted(tokenizer.encode(chr(code))[0] for code in range(128)) == sorted(
        set(tokenizer.encode("".join(map(chr, range(128)))))
    )


def test_end_of_text_decodes_to_nothing(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.end_of_text_id, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"


def test_a_character_cut_in_two_becomes_a_replacement(tokenizer):
    assert tokenizer.decode(tokenizer.encode("👍")[:2]) == "\ufffd"


def test_load_restores_what_was_saved(tokenizer, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(END_OF_TEXT) == tokenizer.encode(END_OF_TEXT)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_pickling_keeps_the_end_of_text_out_of_text(tokenizer):
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode(END_OF_TEXT) == tokenizer.encode(END_OF_TEXT)
    assert sent.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("vocab_size", [-1, 0, 1, 256])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size):
    with pytest.raises(ConfigError, match="at least 257"):
        Tokenizer.train(TEXTS, vocab_size)


def test_a_lone_surrogate_is_refused(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(DataError, match="lone surrogate"):
            encode("ab\ud800")
    with pytest.raises(DataError, match="lone surrogate"):
        Tokenizer.train(["\udfff"], 300)


@pytest.mark.parametrize("token_id", [-1, 300, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, token_id):
    with pytest.raises(DataError, match="0 to 299"):
        tokenizer.decode([5, token_id])


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        Tokenizer.load(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe\0", b'{"model": 3}', b"\x80\x04K\x01."])
def test_a_corrupt_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_truncated_or_altered_tokenizer_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    whole = tokenizer.to_json()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole tokenizer"):
        Tokenizer.load(path)
    data = json.loads(whole)
    data["model"]["merges"].append(["no such", "token"])
    with pytest.raises(DataError, match="not a whole tokenizer"):
        Tokenizer.from_json(json.dumps(data))


def test_a_tokenizer_that_splits_text_first_is_exact_too(tokenizer):
    data = json.loads(tokenizer.to_json())
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    first = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, first, data["pre_tokenizer"]]}
    other = Tokenizer.from_json(json.dumps(data))
    text = "def x10(): return 12345  # naïve xx"
    assert other.decode(other.encode(text)) == text
    assert other.encode(text) != tokenizer.encode(text)
    split["behavior"] = "Removed"
    with pytest.raises(DataError, match="Sequence"):
        Tokenizer.from_json(json.dumps(data))


def test_a_tokenizer_without_some_bytes_is_taken_with_a_warning(tokenizer, caplog):
    data = json.loads(tokenizer.to_json())
    Tokenizer.from_json(json.dumps(data))
    assert not caplog.records
    del data["model"]["vocab"]["\u0100"]  # stands for the byte 0
    assert Tokenizer.from_json(json.dumps(data)).decode(tokenizer.encode("a")) == "a"
    assert "no token of 1 bytes" in caplog.text


def test_another_kind_of_tokenizer_is_refused(tokenizer):
    data = json.loads(tokenizer.to_json())
    with pytest.raises(DataError, match="Lowercase"):
        Tokenizer.from_json(json.dumps(data | {"normalizer": {"type": "Lowercase"}}))
    data["added_tokens"] = []
    del data["model"]["vocab"][END_OF_TEXT]
    with pytest.raises(DataError, match="no token"):
        Tokenizer.from_json(json.dumps(data))
