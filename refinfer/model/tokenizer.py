"""Tokenizers: text to token ids and back, also piece by piece while a text is being generated.

The two forms of `tokenizer.json` that refinfer writes, a byte-pair encoding without merges over characters or over
bytes, are read here without any package; any other form goes to the `tokenizers` package (extra `hf`). Leaves to
others: models, sampling.
Read more: tutorial 07; clauses TOKEN-1 to TOKEN-7.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from refinfer.errors import TokenizerError, TokenizerPackageMissingError
from refinfer.model.tokenizer_config import TokenizerConfig, load_tokenizer_config
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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the special tokens that the file asks for around it unless told otherwise.

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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the id of each UTF-8 byte; raises TokenizerError for half of a surrogate pair."""
        return [self._ids[byte] for byte in _utf8(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes.get(i, _REPLACEMENT.encode()) for i in ids).decode(errors="replace")


class _PackageTokenizer:
    """A `tokenizer.json` of any kind, through the `tokenizers` package."""

    def __init__(self, data: bytes, path: Path, config: TokenizerConfig) -> None:
        try:
            import tokenizers
        except ImportError:
            raise TokenizerPackageMissingError(
                f"{path} needs the tokenizers package: pip install 'refinfer[hf]', or give the prompt as --token-ids"
            ) from None
        with _in_the_package(f"{path} is not a usable tokenizer"):
            self._inner = tokenizers.Tokenizer.from_buffer(data)
            # In two steps, as `transformers` does: a token that is named later keeps the flags given with its id.
            self._inner.add_tokens([tokenizers.AddedToken(**entry) for entry in config.added])
            known = {token.content for token in self._inner.get_added_tokens_decoder().values()}
            special = [entry for entry in config.special if entry["content"] not in known]
            self._inner.add_tokens([tokenizers.AddedToken(**entry) for entry in special])
        # Settings of training that would cut or lengthen a prompt; `transformers` does not apply them either.
        self._inner.no_truncation()
        self._inner.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; raises TokenizerError if the package cannot encode it."""
        text = _utf8(text).decode()
        with _in_the_package("the text cannot be encoded"):
            ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
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

    Tokens that only `tokenizer_config.json` has are added, as `transformers` does.

    Raises:
        TokenizerError: one of the files is malformed.
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
    config = load_tokenizer_config(folder)
    vocab = None if config.added or config.special else _vocab_of(raw)
    if vocab is not None and raw == _character_form(vocab) and all(map(_is_character, vocab)):
        return CharacterTokenizer(vocab)
    if vocab is not None and raw == _byte_form(vocab) and set(vocab) == set(_byte_alphabet().values()):
        return ByteTokenizer({byte: vocab[c] for byte, c in _byte_alphabet().items()})
    return _PackageTokenizer(data, path, config)


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

    Laws: if the context and the ids encode a text, the pieces together are what the ids add to the text of the context.
    If the context ends within a character, the first piece begins with that character. Half a character is never shown.
    For ids that encode no text, what was shown stays. Decoding an id takes no longer the longer the text is.

    Some decoders write a token differently at the start of a text, and some drop a whole run of bytes if one of them is
    wrong. So ids are decoded after the ones before them, from a place where a character begins.
    """

    _MOST_BYTES: Final = 4  # of a character in UTF-8
    _MOST_WAITING: Final = 32  # ids, of which a text needs no more than three
    _CONTEXT: Final = 8  # how many ids are kept after a long run without a whole character

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._shown = tokenizer.decode(self._ids)  # what the reader has seen of the text of `_ids`
        self._latest = [self._shown]  # the text of `_ids` now, and with up to three ids fewer
        ends = range(len(self._ids), max(-1, len(self._ids) - self._MOST_BYTES), -1)
        whole = (end for end in ends if not tokenizer.decode(self._ids[:end]).endswith(_REPLACEMENT))
        self._whole = next(whole, len(self._ids))  # here ends the last of `_ids` that completed a character

    def push(self, token_id: int) -> str:
        """Take the next id and return what can be shown now; may be empty."""
        self._ids.append(token_id)
        before, text = self._latest[-1], self._tokenizer.decode(self._ids)
        self._latest = [*self._latest[1 - self._MOST_BYTES :], text]
        # A run of bytes that becomes a character has fewer characters than before, even if it becomes U+FFFD.
        if not text.endswith(_REPLACEMENT) or len(text) < len(before):
            return self._show_all(text)
        if len(self._ids) - self._whole > self._MOST_WAITING:
            piece = self._show(self._settled(text)) if text.startswith(self._shown) else self._show_all(text)
            self._begin_at(len(self._ids) - self._CONTEXT, text)
            return piece
        return self._show(self._settled(text))

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._show_all(self._latest[-1])

    def _settled(self, text: str) -> str:
        """Return the beginning of a text that further ids cannot change, although it ends with U+FFFD."""
        # Of any four texts in a row one ends with a whole character, so what they have in common is right.
        enough = len(self._latest) == self._MOST_BYTES
        common = os.path.commonprefix(self._latest) if enough else ""  # noqa: RUF071  (of texts, not of paths)
        return max(common, text.rstrip(_REPLACEMENT), key=len)

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _show_all(self, text: str) -> str:
        if not text.startswith(self._shown):  # the context ended within a character
            whole = self._tokenizer.decode(self._ids[: self._whole])
            self._shown = max(whole, self._shown.rstrip(_REPLACEMENT), key=len)
        if not text.startswith(self._shown):  # the bytes after what was shown are no character, and spoil it
            del self._ids[: self._whole]
            self._whole, self._shown, text = 0, "", self._tokenizer.decode(self._ids)
        piece = self._show(text)
        self._begin_at(self._whole, text)
        return piece

    def _begin_at(self, start: int, text: str) -> None:
        """Forget the ids before `start`, or those after the context if they have had no text for too long."""
        if recent := self._tokenizer.decode(self._ids[start:]):
            waiting = len(text) - len(self._shown)
            self._ids, self._shown, self._latest = self._ids[start:], recent[: len(recent) - waiting], [recent]
            self._whole = len(self._ids)
        elif len(self._ids) - self._whole > self._MOST_WAITING:
            del self._ids[self._whole :]
            self._shown = self._tokenizer.decode(self._ids)
            self._latest = [self._shown]
