"""A byte-level BPE tokenizer: text enters, token ids leave, and the way back is exact.

Every byte has a token of its own, so no text is out of vocabulary. One special
token, ``<|endoftext|>``, closes a document; it can be appended by its id and is
never produced by encoding text, not even text that spells it out.

Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019 (GPT-2: on bytes,
after a split into words), as implemented by the ``tokenizers`` library.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moe_bitnet.errors import ConfigError, DataError
from moe_bitnet.files import write_text_atomically

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text


class Tokenizer:
    """Encode text to token ids and back; made by :meth:`train`, :meth:`load` or :meth:`from_json`.

    It can be sent to another process: what travels is its JSON.
    """

    def __init__(self, inner: Any) -> None:
        inner.no_truncation()
        inner.no_padding()
        # The library keeps this switch out of its JSON and its pickles, so it is set here, for every way in.
        inner.encode_special_tokens = True
        self._inner = inner
        self._end_of_text_id = int(inner.token_to_id(END_OF_TEXT))
        self._vocab_size = int(inner.get_vocab_size(with_added_tokens=True))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges of frequent neighbours; the same texts, in any order, give the same tokenizer.

        Args:
            texts: training texts; they are read once and not kept.
            vocab_size: V, tokens wanted, at least 257 (256 bytes and the end of text). Texts with too
                few pairs that occur twice give fewer; :attr:`vocab_size` tells how many there are.
        Returns:
            A tokenizer whose end of text has id 0 and whose bytes have ids 1 to 256.
        Raises:
            ConfigError: ``vocab_size`` is below 257.
            DataError: a text holds a lone surrogate.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"Tokenizer.train: vocab_size is {vocab_size}, but 256 bytes and {END_OF_TEXT} need "
                f"{MIN_VOCAB_SIZE}. Pass at least {MIN_VOCAB_SIZE}."
            )
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator((_checked(text) for text in texts), trainer)
        tokenizer = cls(inner)
        if tokenizer.vocab_size < vocab_size:
            logger.warning("the texts give %d tokens, %d were asked for", tokenizer.vocab_size, vocab_size)
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a ``tokenizer.json``; nothing in it is executed.

        Raises:
            DataError: the file is missing, unreadable or no byte-level BPE tokenizer with ``<|endoftext|>``.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"The tokenizer {path} cannot be read ({_reason(error)}). Pass a tokenizer.json that training saved."
            ) from error
        try:
            return cls.from_json(text)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Build a tokenizer from what :meth:`to_json` gave.

        Raises:
            DataError: the text is no byte-level BPE tokenizer with ``<|endoftext|>``.
        """
        advice = "Save the tokenizer again, or pass the tokenizer.json of another run."
        try:
            kind = _kind(json.loads(text))
            # The library raises bare Exception for whatever it does not understand.
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise DataError(f"This is not a whole tokenizer in JSON ({_reason(error)}). {advice}") from error
        if kind != ("BPE", "ByteLevel", "ByteLevel", None):
            raise DataError(f"This tokenizer is {kind}, only byte-level BPE without a normalizer is taken. {advice}")
        if inner.token_to_id(END_OF_TEXT) is None:
            raise DataError(f"This tokenizer has no token {END_OF_TEXT}, which closes a document. {advice}")
        if missing := set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - inner.get_vocab().keys():
            logger.warning(
                "this tokenizer has no token of %d bytes; where they occur in a text, they vanish", len(missing)
            )
        return cls(inner)

    def to_json(self) -> str:
        """Return the whole tokenizer as JSON in the layout of the ``tokenizers`` library."""
        return str(self._inner.to_str(pretty=True))

    def save(self, path: Path) -> None:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        write_text_atomically(path, self.to_json())

    @property
    def vocab_size(self) -> int:
        """V: ids run from 0 to ``vocab_size - 1``."""
        return self._vocab_size

    @property
    def end_of_text_id(self) -> int:
        """The id that closes a document (0 in a tokenizer from :meth:`train`)."""
        return self._end_of_text_id

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without an end of text.

        The characters ``<|endoftext|>`` inside ``text`` are encoded as ordinary characters.

        Raises:
            DataError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        ids: list[int] = self._inner.encode(_checked(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return :meth:`encode` of each text, computed on all cores.

        Raises:
            DataError: a text holds a lone surrogate, which UTF-8 cannot express.
        """
        checked = [_checked(text) for text in texts]
        return [encoding.ids for encoding in self._inner.encode_batch_fast(checked, add_special_tokens=False)]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of ``token_ids``; the exact inverse of :meth:`encode`.

        The end of text gives no characters. Bytes that are no UTF-8, as when a
        character is cut in two, become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        ids = [int(token_id) for token_id in token_ids]
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise DataError(
                    f"decode: token id {token_id} is not in the vocabulary, ids run from 0 to {self._vocab_size - 1}. "
                    "Use the tokenizer that the model was trained with."
                )
        return str(self._inner.decode(ids, skip_special_tokens=True))

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Tokenizer.from_json, (self.to_json(),)


def _checked(text: str) -> str:
    """Return ``text`` if UTF-8 can express it; the library's own error does not say what is wrong."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text holds the lone surrogate {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
            "express. Decode the bytes with errors='replace' before encoding to tokens."
        ) from error
    return text


def _kind(data: Any) -> tuple[str | None, ...]:
    """Name the stages of a tokenizer's JSON: model, pre-tokenizer, decoder, normalizer."""
    stages = (data[stage] for stage in ("model", "pre_tokenizer", "decoder", "normalizer"))
    return tuple(None if stage is None else _stage_kind(stage) for stage in stages)


def _stage_kind(stage: Any) -> str:
    """Name a stage; a sequence that only splits text before its last part, and drops nothing, is that part."""
    parts = stage.get("pretokenizers") if stage["type"] == "Sequence" else None
    if parts and all(part["type"] == "Digits" or part.get("behavior") == "Isolated" for part in parts[:-1]):
        return str(parts[-1]["type"])
    return str(stage["type"])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
