"""English prose that is on this machine already: nothing is downloaded.

    python -m benchmarks.prose                 # what was found, by package
    python -m benchmarks.prose --folder BOOKS  # of a folder of text, HTML or POD files, gzip-compressed or not

Debian ships long English texts as packages. Those listed in :data:`SOURCES` are read if they are installed, always in
the same order, so that the same packages give the same documents on every machine::

    apt-get install bible-kjv anarchism perl-doc jargon-text debian-reference-en developers-reference debian-policy

Markup is removed, and of each file only paragraphs of prose stay (see :func:`is_prose`), each once: listings, tables,
menus and licences that many files repeat would teach a model nothing about English.
"""

import argparse
import gzip
import re
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from cluster.training.document import Document, cut_document
from moe_bitnet.errors import DataError

DOCUMENT_BYTES = 64 * 1024
"""Longer texts are cut, so that training and validation both get parts of every source."""
_MIN_PARAGRAPH_CHARS = 80
_MIN_LETTER_SHARE = 0.94  # of the characters of a paragraph: letters, spaces and the signs of ordinary sentences
_MIN_COMMON_SHARE = 0.25  # of its words; in English prose these make up some 40 %
# fmt: off
_COMMON_WORDS = frozenset((
    "a", "all", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "could", "do", "for", "from",
    "had", "has", "have", "he", "her", "his", "i", "if", "in", "into", "is", "it", "its", "may", "more", "no",
    "not", "of", "on", "one", "only", "or", "other", "our", "out", "said", "shall", "she", "should", "so", "than",
    "that", "the", "their", "them", "then", "there", "these", "they", "this", "to", "unto", "up", "upon", "was",
    "we", "were", "what", "when", "which", "who", "will", "with", "would", "you", "your",
))
# fmt: on
_SENTENCE_SIGNS = frozenset(
    " .,;:'\"!?-()\N{RIGHT SINGLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}"
    "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}\N{EM DASH}\N{EN DASH}"
)


@dataclass(frozen=True)
class Source:
    """A Debian package with prose in it.

    Attributes:
        package: its name.
        patterns: of its files, below ``/``; empty for the Bible, which a program unpacks.
    """

    package: str
    patterns: tuple[str, ...] = ()


SOURCES = (
    Source("bible-kjv"),
    Source("anarchism", ("usr/share/doc/anarchism/html/*.html",)),
    Source("perl-doc", ("usr/share/perl/5.*/pod/*.pod", "usr/share/perl/5.*.*/pod/*.pod")),
    Source("jargon-text", ("usr/share/doc/jargon-text/jargon.txt*",)),
    Source("debian-reference-en", ("usr/share/debian-reference/debian-reference.en.txt*",)),
    Source("developers-reference", ("usr/share/developers-reference/_sources/*.txt",)),
    Source("debian-policy", ("usr/share/doc/debian-policy/policy.txt*", "usr/share/doc/debian-policy/fhs/*.txt*")),
)


def prose_documents(folder: Path | None = None) -> list[Document]:
    """Return English prose in documents of at most :data:`DOCUMENT_BYTES`, the same ones in the same order each time.

    Args:
        folder: where to look for text, HTML and POD files instead of in the packages of :data:`SOURCES`.
    Raises:
        DataError: no prose was found; the message says what to install.
    """
    return [document for documents in prose_by_source(folder).values() for document in documents]


def prose_by_source(folder: Path | None = None) -> dict[str, list[Document]]:
    """Return the documents of :func:`prose_documents` by package, or by the one folder."""
    seen: set[str] = set()
    sources: list[tuple[str, Iterable[tuple[str, list[str]]]]]
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder. Pass one that holds text, HTML or POD files.")
        sources = [(folder.name, _read_files(path for path in folder.rglob("*") if path.is_file()))]
    else:
        sources = [(source.package, _read_source(source)) for source in SOURCES]
    found = {name: list(_documents(name, texts, seen)) for name, texts in sources}
    if not any(found.values()):
        packages = " ".join(source.package for source in SOURCES)
        where = f"{folder} holds no English prose" if folder is not None else "No package with English prose is here"
        raise DataError(f"{where}. Run `apt-get install {packages}`, or pass a folder of English texts.")
    return found


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph, on one line, is English sentences rather than code, a table, a heading or a list."""
    if len(paragraph) < _MIN_PARAGRAPH_CHARS:
        return False
    num_plain = sum(character.isalpha() or character in _SENTENCE_SIGNS for character in paragraph)
    words = re.findall(r"[a-z]+", paragraph.lower())
    num_common = sum(word in _COMMON_WORDS for word in words)
    return num_plain >= _MIN_LETTER_SHARE * len(paragraph) and num_common >= _MIN_COMMON_SHARE * len(words)


def _documents(source: str, texts: Iterable[tuple[str, list[str]]], seen: set[str]) -> Iterator[Document]:
    """Yield documents of the paragraphs that are prose and not in ``seen``."""
    for name, paragraphs in texts:
        kept = []
        for paragraph in paragraphs:
            if paragraph not in seen and is_prose(paragraph):
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            yield from cut_document(Document(f"{source}/{name}", "\n\n".join(kept) + "\n"), DOCUMENT_BYTES)


# --- Reading: each file gives its paragraphs, each on one line ---------------------------------------------------


def _read_source(source: Source) -> Iterator[tuple[str, list[str]]]:
    if not source.patterns:
        return _read_bible()
    return _read_files(path for pattern in source.patterns for path in Path("/").glob(pattern))


def _read_bible() -> Iterator[tuple[str, list[str]]]:
    """Yield the books of the King James Bible, a chapter a paragraph, if Debian's ``bible`` program is installed."""
    try:
        # "-f" switches its layout off: a verse a line, "Ge1:1 In the beginning ..."
        command = ["bible", "-f", "gen1:1-rev22:21"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError):
        return
    books: dict[str, dict[str, list[str]]] = {}
    for line in output.splitlines():
        if verse := re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line):
            books.setdefault(verse[1], {}).setdefault(verse[2], []).append(verse[3])
    for book, chapters in books.items():
        yield book, [" ".join(verses) for verses in chapters.values()]


def _read_files(paths: Iterable[Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield name and paragraphs of every text file, by name; binary and unreadable ones are left out."""
    for path in sorted({path.resolve() for path in paths}):
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError):
            continue
        if "\0" in text:
            continue
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        yield path.name, _READERS.get(suffix, plain_paragraphs)(text)


def plain_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of plain text, which blank lines divide."""
    return [_on_one_line(block) for block in re.split(r"\n\s*\n", text)]


def pod_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of Perl's documentation format without commands, listings and formatting codes."""
    blocks = [block for block in re.split(r"\n\s*\n", text) if not block.startswith(("=", " ", "\t"))]
    return [_on_one_line(_without_codes(block)) for block in blocks]


def html_paragraphs(text: str) -> list[str]:
    """Return the paragraphs, list items and quotations of a page of HTML."""
    parser = _ParagraphParser()
    parser.feed(text)
    parser.close()
    return parser.finish()


def _without_codes(block: str) -> str:
    """Replace codes such as ``B<bold>`` and ``L<text|target>`` by their text, innermost first."""
    block = re.sub(r"E<lt>", "<", re.sub(r"E<gt>", ">", block))
    code = re.compile(r"[A-Z](?:<<+ ([^<>]*?) >>+|<([^<>]*)>)")
    while (changed := code.sub(lambda match: _shown(match[1] or match[2] or ""), block)) != block:
        block = changed
    return block


def _shown(content: str) -> str:
    """Return what a reader sees of a code's content: of ``text|target`` the text, of ``/"section"`` the section."""
    return content.split("|")[0].removeprefix("/").strip('"')


def _on_one_line(block: str) -> str:
    return " ".join(block.split())


class _ParagraphParser(HTMLParser):
    # fmt: off
    _BLOCKS = frozenset((
        "blockquote", "body", "br", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ol", "p",
        "table", "td", "th", "title", "tr", "ul",
    ))
    # fmt: on
    _HIDDEN = frozenset(("head", "nav", "pre", "script", "style"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._paragraphs: list[str] = []
        self._parts: list[str] = []
        self._num_hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._num_hidden += tag in self._HIDDEN
        if tag in self._BLOCKS:
            self._close_paragraph()

    def handle_endtag(self, tag: str) -> None:
        self._num_hidden -= tag in self._HIDDEN and self._num_hidden > 0
        if tag in self._BLOCKS:
            self._close_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._num_hidden:
            self._parts.append(data)

    def finish(self) -> list[str]:
        self._close_paragraph()
        return self._paragraphs

    def _close_paragraph(self) -> None:
        if paragraph := _on_one_line("".join(self._parts)):
            self._paragraphs.append(paragraph)
        self._parts.clear()


_READERS: dict[str, Callable[[str], list[str]]] = {
    ".html": html_paragraphs,
    ".htm": html_paragraphs,
    ".pod": pod_paragraphs,
}


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder of text, HTML or POD files to read instead")
    arguments = parser.parse_args()
    found = prose_by_source(arguments.folder)
    for name, documents in found.items():
        size = sum(document.num_bytes for document in documents)
        print(f"{name:24} {len(documents):5} documents {size / 1e6:7.2f} MB" if documents else f"{name:24} not found")
    total = sum(document.num_bytes for documents in found.values() for document in documents)
    print(f"{'together':24} {sum(map(len, found.values())):5} documents {total / 1e6:7.2f} MB")


if __name__ == "__main__":
    main()
