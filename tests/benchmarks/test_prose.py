import gzip
from pathlib import Path

import pytest

from benchmarks import prose
from benchmarks.prose import html_paragraphs, is_prose, plain_paragraphs, pod_paragraphs, prose_documents
from moe_bitnet.errors import DataError

SENTENCE = "It was the best of times, it was the worst of times, it was the age of wisdom, and we had all before us."
OTHER = "There is no frigate like a book to take us lands away, nor any coursers like a page of prancing poetry."


def test_sentences_are_prose() -> None:
    assert is_prose(SENTENCE)


@pytest.mark.parametrize(
    "text",
    [
        "A short heading",
        "for (i = 0; i < n; ++i) { total += x[i] * y[i]; } /* add up */ return total / (n - 1) + offset[k][0];",
        "| name | 12 | 13 | 15 | 19 | 21 | and | of | the | 31 | 33 | 35 | 37 | 39 | 41 | 43 | 45 | 47 | 49 | 51 |",
        "Es war die beste der Zeiten, es war die schlechteste der Zeiten, es war das Zeitalter der Weisheit und mehr.",
    ],
)
def test_other_paragraphs_are_not_prose(text: str) -> None:
    assert not is_prose(text)


def test_paragraphs_of_plain_text_become_single_lines() -> None:
    assert plain_paragraphs("one\n  two\n\n \nthree\n") == ["one two", "three"]


def test_pod_loses_commands_listings_and_codes() -> None:
    text = (
        '=head1 NAME\n\nUse B<the I<bold>> way, L<see here|perlfunc/open>, L</"Bugs">, C<< a >> E<gt> b.\n\n  code();\n'
    )
    assert pod_paragraphs(text) == ["Use the bold way, see here, Bugs, a > b."]


def test_html_loses_markup_listings_and_scripts() -> None:
    text = "<head><title>T</title></head><p>One <b>two</b> &amp; three<p>four<pre>code</pre><ul><li>five</ul>"
    assert html_paragraphs(text) == ["One two & three", "four", "five"]


def test_a_folder_gives_each_paragraph_once_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(f"{SENTENCE}\n\n{OTHER}\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(f"{OTHER}\n\nx = 1\n".encode()))
    (tmp_path / "c.bin").write_bytes(b"\0\xff")
    (tmp_path / "d.gz").write_bytes(gzip.compress(SENTENCE.encode())[:-3])
    documents = prose_documents(tmp_path)
    assert [(document.name, document.text) for document in documents] == [
        (f"{tmp_path.name}/a.txt.gz", f"{OTHER}\n"),
        (f"{tmp_path.name}/b.txt", f"{SENTENCE}\n"),
    ]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"{SENTENCE} {'I' * number}." for number in range(1200)))
    documents = prose_documents(tmp_path)
    assert len(documents) > 1
    assert max(document.num_bytes for document in documents) <= prose.DOCUMENT_BYTES


def test_no_prose_is_an_error_that_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n")
    with pytest.raises(DataError, match="apt-get install bible-kjv anarchism"):
        prose_documents(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        prose_documents(tmp_path / "a.txt")
