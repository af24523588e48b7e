"""Tokenizers: text to token ids and back, also piece by piece while a text is being generated.

The two forms of `tokenizer.json` that refinfer writes, a byte-pair encoding without merges over characters or over
bytes, are read here without any package; any other form goes to the `tokenizers` package (extra `hf`). Leaves to
others: models, sampling.
Read more: tutorial 07; clauses TOKEN-1 to TOKEN-6.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from refinfer.errors import TokenizerError, TokenizerPackageMissingError
from refinfer.units import shortened, shown
from refinfer.whole_file import parse_json, read_whole

__all__ = [
    "ByteTokenizer",
    "CharacterTokenizer",
    "TextStream",
    "Tokenizer",
    "byte_tokenizer_json",
    "character_tokenizer_json",
    "load_tokenizer",
]

TOKENIZER_NAME: Final = "tokenizer.json"
LARGEST_TOKENIZER_BYTES: Final = 64_000_000  # the largest published ones have 35 MB
_LARGEST_OWN_BYTES: Final = 4_000_000
_REPLACEMENT: Final = "\ufffd"


class Tokenizer(Protocol):
    """Turns text into token ids and back."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`.

        Raises:
            TokenizerError: the text has something the vocabulary cannot express.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; an id without a text becomes U+FFFD or nothing."""
        ...


class CharacterTokenizer:
    """One token for each character of a fixed alphabet.

    Examples:
        >>> tokenizer = CharacterTokenizer({"a": 0, "b": 1})
        >>> tokenizer.encode("abba"), tokenizer.decode([1, 0])
        ([0, 1, 1, 0], 'ba')
    """

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self._ids = dict(vocab)
        self._characters = {i: c for c, i in vocab.items()}

    def encode(self, text: str) -> list[int]:
        """Return the id of each character; raises TokenizerError for one that is not in the alphabet."""
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            alphabet = "".join(sorted(self._ids))
            raise TokenizerError(
                f"this model has no token for the character {error.args[0]!r}; it knows only {shown(alphabet)}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the characters of `ids`."""
        return "".join(self._characters.get(i, _REPLACEMENT) for i in ids)


class ByteTokenizer:
    """One token for each byte of UTF-8; `vocab` gives the id of each byte.

    Examples:
        >>> ByteTokenizer({byte: byte for byte in range(256)}).encode("né")
        [110, 195, 169]
    """

    def __init__(self, vocab: Mapping[int, int]) -> None:
        self._ids = dict(vocab)
        self._bytes = {i: bytes([b]) for b, i in vocab.items()}

    def encode(self, text: str) -> list[int]:
        """Return the id of each UTF-8 byte; raises TokenizerError for half of a surrogate pair."""
        return [self._ids[byte] for byte in _utf8(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes.get(i, _REPLACEMENT.encode()) for i in ids).decode(errors="replace")


class _PackageTokenizer:
    """A `tokenizer.json` of any kind, through the `tokenizers` package."""

    def __init__(self, data: bytes, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise TokenizerPackageMissingError(
                f"{path} needs the tokenizers package: pip install 'refinfer[hf]', or give the prompt as --token-ids"
            ) from None
        with _in_the_package(f"{path} is not a usable tokenizer"):
            self._inner = tokenizers.Tokenizer.from_buffer(data)
        # Settings of training that would cut or lengthen a prompt; `transformers` does not apply them either.
        self._inner.no_truncation()
        self._inner.no_padding()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens the file asks for; raises TokenizerError."""
        text = _utf8(text).decode()
        with _in_the_package("the text cannot be encoded"):
            ids: list[int] = self._inner.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        # An id beyond the vocabulary, as a model with a padded table may give, means no text.
        known = [i for i in ids if self._inner.id_to_token(i) is not None]
        with _in_the_package("the tokens cannot be decoded"):
            text: str = self._inner.decode(known)
        return text


@contextmanager
def _in_the_package(problem: str) -> Iterator[None]:
    """Turn what the package raises into a `TokenizerError`: plain `Exception`, or a panic, which is not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{problem}: {shortened(str(error), 200)}") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text has a character that UTF-8 cannot express: {error.reason}") from None


def _is_character(token: str) -> bool:
    return len(token) == 1 and not "\ud800" <= token <= "\udfff"


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Read `tokenizer.json` in `folder`, or return None if the folder has no such file.

    Raises:
        TokenizerError: the file is malformed.
        TokenizerPackageMissingError: it needs the `tokenizers` package, and that is not installed.
    """
    path = folder / TOKENIZER_NAME
    if not os.path.lexists(path):
        return None
    try:
        data = read_whole(path, LARGEST_TOKENIZER_BYTES)
        raw = parse_json(data) if len(data) <= _LARGEST_OWN_BYTES else None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from None
    vocab = _vocab_of(raw)
    if vocab is not None and raw == _character_form(vocab) and all(map(_is_character, vocab)):
        return CharacterTokenizer(vocab)
    if vocab is not None and raw == _byte_form(vocab) and set(vocab) == set(_byte_alphabet().values()):
        return ByteTokenizer({byte: vocab[c] for byte, c in _byte_alphabet().items()})
    return _PackageTokenizer(data, path)


def _vocab_of(raw: object) -> dict[str, int] | None:
    """Return the vocabulary in a `tokenizer.json` object, if it has a plain one: a different id for each token."""
    model = raw.get("model") if isinstance(raw, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        return None
    return vocab if len(set(vocab.values())) == len(vocab) else None


def character_tokenizer_json(characters: Sequence[str]) -> dict[str, Any]:
    """Return a `tokenizer.json` object with one token for each of `characters`, which `transformers` reads too."""
    return _character_form({c: i for i, c in enumerate(characters)})


def byte_tokenizer_json() -> dict[str, Any]:
    """Return a `tokenizer.json` object with one token for each byte, which `transformers` reads too."""
    return _byte_form({c: byte for byte, c in _byte_alphabet().items()})


def _character_form(vocab: dict[str, int]) -> dict[str, Any]:
    return _tokenizer_json(vocab, None, {"type": "Fuse"})


def _byte_form(vocab: dict[str, int]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _tokenizer_json(vocab, byte_level, byte_level)


def _tokenizer_json(
    vocab: dict[str, int], pre_tokenizer: dict[str, Any] | None, decoder: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "BPE", "unk_token": None, "byte_fallback": False, "vocab": vocab, "merges": []},
    }


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


class TextStream:
    """Turns ids that arrive one by one into pieces of text that can be shown at once.

    Law: the pieces together are the text that the ids add to the text of `context`. A character is held back until its
    last token has arrived, so that half a character is never shown.
    """

    _MOST_STILL_COMING: Final = 3  # tokens of an unfinished character: UTF-8 has at most four bytes
    _CONTEXT: Final = 8  # earlier tokens that can change how the next one is written

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = list(context[-self._CONTEXT :])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take the next id and return what can be shown now; may be empty."""
        self._pending.append(token_id)
        piece = self._text_of(self._pending)
        if not piece.endswith(_REPLACEMENT):
            return self._show(len(self._pending), piece)
        # Either half a character, or bytes that are not UTF-8. Text that later tokens cannot change may be shown.
        settled = len(self._pending) - self._MOST_STILL_COMING
        if settled > 0 and piece.startswith(start := self._text_of(self._pending[:settled])):
            return self._show(settled, start)
        return ""

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._show(len(self._pending), self._text_of(self._pending))

    def _text_of(self, ids: list[int]) -> str:
        # Some tokenizers write a token differently at the start of a text: decode it after the tokens before it.
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + ids)[len(before) :]

    def _show(self, n: int, piece: str) -> str:
        self._shown = (self._shown + self._pending[:n])[-self._CONTEXT :]
        del self._pending[:n]
        return piece
