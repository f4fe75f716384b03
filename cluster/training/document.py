"""A document: a text with a name, its hash, its pieces and samples of many.

What is chosen depends on the texts alone, never on their names or their order.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moe_bitnet.errors import ConfigError, DataError


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Attributes:
        name: a label for people, such as ``stdlib/json/decoder.py`` or ``books.parquet#12``.
        text: the text itself, unchanged but for a byte order mark.
    """

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(_encoded(self))


def sample_documents(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """Keep ``max_bytes`` of text, chosen by the hash of each text and so evenly over names and folders.

    The choice depends on the texts alone, not on their order; the last one chosen is cut at a line end
    to fit. Memory stays near ``max_bytes``, however long the input is.

    Args:
        documents: any number of documents; read once.
        max_bytes: bytes of UTF-8 to keep, at least 1.
    Returns:
        The chosen documents in the order of the input.
    Raises:
        ConfigError: ``max_bytes`` is below 1.
    """
    if max_bytes < 1:
        raise ConfigError(f"sample_documents: max_bytes is {max_bytes}. Pass at least 1.")
    # A max-heap by hash: once the smaller hashes fill the budget, the largest can never be chosen again.
    heap: list[tuple[int, int, int, Document]] = []
    total_bytes = 0
    for index, document in enumerate(documents):
        key = int.from_bytes(content_hash(document, purpose=b"sample"), "big")
        heapq.heappush(heap, (-key, -index, document.num_bytes, document))
        total_bytes += document.num_bytes
        while total_bytes - heap[0][2] >= max_bytes:
            total_bytes -= heapq.heappop(heap)[2]
    chosen = {-index: document for _, index, _, document in heap}
    if total_bytes > max_bytes:
        _, index, num_bytes, last = heap[0]
        data = _encoded(last)
        end = _cut_before(data, 0, max_bytes - (total_bytes - num_bytes))
        chosen[-index] = Document(last.name, data[:end].decode("utf-8"))
    return [chosen[index] for index in sorted(chosen) if chosen[index].text]


def cut_document(document: Document, max_bytes: int) -> Iterator[Document]:
    """Yield ``document``, in pieces of at most ``max_bytes`` (at least 4) if it is longer.

    Pieces end at line ends where there is one, never inside a character, and together are the text.
    """
    data = _encoded(document)
    if len(data) <= max_bytes:
        yield document
        return
    start = number = 0
    while start < len(data):
        end = _cut_before(data, start, max_bytes)
        yield Document(f"{document.name}#{number}", data[start:end].decode("utf-8"))
        start, number = end, number + 1


def content_hash(document: Document, purpose: bytes, seed: int = 0) -> bytes:
    """Return 16 bytes that depend on the text, ``purpose`` (at most 16 bytes) and ``seed``, not on the name.

    Different purposes give independent hashes: the documents that a byte cap keeps must not all fall into
    the same split.
    """
    salt = (seed % 2**64).to_bytes(8, "big")
    return hashlib.blake2b(_encoded(document), digest_size=16, person=purpose, salt=salt).digest()


def _encoded(document: Document) -> bytes:
    try:
        return document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The document {document.name!r} holds a lone surrogate, which UTF-8 cannot express. "
            "Decode its bytes with errors='replace'."
        ) from error


def _cut_before(data: bytes, start: int, max_bytes: int) -> int:
    """Return the last line end within ``max_bytes`` of ``start``, or else the last end of a character."""
    limit = start + max_bytes
    if limit >= len(data):
        return len(data)
    line_end = data.rfind(b"\n", start, limit) + 1
    if line_end > start:
        return line_end
    while data[limit] & 0b1100_0000 == 0b1000_0000:  # the byte continues a character
        limit -= 1
    return limit
