"""Specifies `refinfer.model.tokenizer`: text to ids and back, all at once and piece by piece."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

import refinfer
from refinfer.errors import TokenizerError
from refinfer.model.tokenizer import (
    TextStream,
    Tokenizer,
    byte_tokenizer_json,
    character_tokenizer_json,
    load_tokenizer,
)

CHARACTERS = st.characters(exclude_categories=["Cs"])  # what UTF-8 can express
TEXT = st.text(CHARACTERS)
FEW = character_tokenizer_json("ab c")
BYTES = byte_tokenizer_json()


def load(raw: dict[str, Any], config: object = None) -> Tokenizer:
    """Return the tokenizer of a folder with these files; without a `tokenizer_config.json` if `config` is None."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
        if config is not None:
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = load_tokenizer(Path(folder))
    assert tokenizer is not None
    return tokenizer


def of_the_package(raw: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def merging_json() -> dict[str, Any]:
    """Return a byte-level tokenizer with merges: parts of words, a whole character, and half of one."""
    letter = {byte: character for character, byte in BYTES["model"]["vocab"].items()}
    pairs = [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"\xc3", b"\xa9"), (b"\xf0", b"\x9f"), (b" ", b"\xf0\x9f")]
    merges = [("".join(letter[b] for b in left), "".join(letter[b] for b in right)) for left, right in pairs]
    vocab = BYTES["model"]["vocab"] | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return dict(json.loads(inner.to_str()))


def word_json() -> dict[str, Any]:
    """Return a tokenizer of two words that writes no space before the first word of a text."""
    inner = tokenizers.Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1}, unk_token="▁once"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return dict(json.loads(inner.to_str()))


BYTE_TOKENIZER = load(BYTES)
MERGING_TOKENIZER = load(merging_json())


@st.composite
def alphabets_and_texts(draw: st.DrawFn) -> tuple[list[str], str]:
    alphabet = draw(st.lists(CHARACTERS, min_size=1, max_size=20, unique=True))
    return alphabet, draw(st.text(st.sampled_from(alphabet)))


@pytest.mark.spec("TOKEN-1", "TOKEN-2")
@given(alphabets_and_texts())
def test_characters_of_the_alphabet_come_back_and_have_the_ids_of_the_package(drawn: tuple[list[str], str]) -> None:
    alphabet, text = drawn
    raw = character_tokenizer_json(alphabet)
    tokenizer, package = load(raw), of_the_package(raw)
    ids = tokenizer.encode(text)
    assert ids == [alphabet.index(character) for character in text] == package.encode(text).ids
    assert tokenizer.decode(ids) == text == package.decode(ids)


@pytest.mark.spec("TOKEN-1", "TOKEN-2")
@given(TEXT)
def test_any_text_comes_back_from_bytes_and_has_the_ids_of_the_package(text: str) -> None:
    ids = BYTE_TOKENIZER.encode(text)
    assert ids == list(text.encode()) == of_the_package(BYTES).encode(text).ids
    assert BYTE_TOKENIZER.decode(ids) == text


@pytest.mark.spec("TOKEN-2")
@given(st.binary())
def test_any_bytes_also_those_of_no_text_decode_as_in_the_package(content: bytes) -> None:
    ids = list(content)
    assert BYTE_TOKENIZER.decode(ids) == content.decode(errors="replace") == of_the_package(BYTES).decode(ids)


@pytest.mark.spec("TOKEN-2")
def test_ids_are_those_of_the_file_not_those_of_the_order_in_it() -> None:
    assert load(FEW | {"model": FEW["model"] | {"vocab": {"a": 7, "b": 3}}}).encode("ab") == [7, 3]
    reversed_bytes = {character: 255 - byte for character, byte in BYTES["model"]["vocab"].items()}
    assert load(BYTES | {"model": BYTES["model"] | {"vocab": reversed_bytes}}).encode("né") == [145, 60, 86]


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 6},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "b",
}
SPECIAL = {
    "id": 9,
    "content": "ab",
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}
BYTE_LEVEL = BYTES["pre_tokenizer"]
FILES_WITHOUT_MERGES = {
    "characters": FEW,
    "bytes": BYTES,
    "spaces dropped": FEW | {"pre_tokenizer": {"type": "Whitespace"}},
    "space put in front": character_tokenizer_json("ab▁c") | {"pre_tokenizer": METASPACE},
    "byte space put in front": BYTES | {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "bytes split into words": BYTES | {"pre_tokenizer": BYTE_LEVEL | {"use_regex": True}},
    "bytes not made": BYTES | {"pre_tokenizer": None},
    "letters lowered": FEW | {"normalizer": {"type": "Lowercase"}},
    "letters joined with spaces": FEW | {"decoder": None},
    "special tokens": FEW | {"added_tokens": [SPECIAL]},
    "unknown letter": FEW | {"model": FEW["model"] | {"unk_token": "c", "vocab": {"a": 0, " ": 1, "c": 2}}},
    "suffix": FEW | {"model": FEW["model"] | {"end_of_word_suffix": "b"}},
    "prefix": FEW | {"model": FEW["model"] | {"continuing_subword_prefix": "#"}},
    "truncation": FEW | {"truncation": TRUNCATION},
    "padding": FEW | {"padding": PADDING},
}


@pytest.mark.spec("TOKEN-2")
@pytest.mark.parametrize("raw", FILES_WITHOUT_MERGES.values(), ids=FILES_WITHOUT_MERGES)
def test_a_file_without_merges_means_what_it_means_to_the_package(raw: dict[str, Any]) -> None:
    tokenizer, package = load(raw), of_the_package(raw)
    package.no_truncation()  # settings of training, which `transformers` turns off for a prompt
    package.no_padding()
    ids = package.encode("ab ac").ids
    assert tokenizer.encode("ab ac") == ids
    assert tokenizer.decode(ids) == package.decode(ids)


@pytest.mark.spec("TOKEN-3")
@given(TEXT | st.text("hel é😀\n"))
def test_a_file_with_merges_has_the_ids_and_the_text_of_the_package(text: str) -> None:
    package = of_the_package(merging_json())
    ids = MERGING_TOKENIZER.encode(text)
    assert ids == package.encode(text).ids
    assert MERGING_TOKENIZER.decode(ids) == text == package.decode(ids)


@pytest.mark.spec("TOKEN-3")
def test_merges_are_applied() -> None:
    assert MERGING_TOKENIZER.encode("hello é") == [258, ord("o"), ord(" "), 259]


ADDS_A_TOKEN = {
    "of a role": {"eos_token": "</s>"},
    "with an id": {"added_tokens_decoder": {"4": {"content": "</s>", "special": True}}},
    "both": {"eos_token": "</s>", "added_tokens_decoder": {"4": {"content": "</s>", "special": True}}},
}


@pytest.mark.spec("TOKEN-2", "TOKEN-7")
@pytest.mark.parametrize("config", ADDS_A_TOKEN.values(), ids=ADDS_A_TOKEN)
def test_a_file_without_merges_may_get_a_token_from_the_config(config: dict[str, Any]) -> None:
    assert load(FEW, config).encode("a</s>b") == [0, 4, 1]


@pytest.mark.spec("TOKEN-7")
def test_added_tokens_come_in_the_order_of_their_ids() -> None:
    nine = character_tokenizer_json("abcdefghi")
    added = {"10": {"content": "<11th>"}, "9": {"content": "<10th>"}}
    assert load(nine, {"added_tokens_decoder": added}).encode("i<10th><11th>") == [8, 9, 10]


@pytest.mark.spec("TOKEN-7")
@pytest.mark.parametrize("value", ["ab", 5, True, None], ids=repr)
@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_extra_tokens_that_are_no_list_are_none(key: str, value: object) -> None:
    tokenizer = load(FEW, {key: value})
    assert tokenizer.encode("ab c") == [0, 1, 2, 3]
    assert tokenizer.decode([0, 1, 2, 3]) == "ab c"


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["tokenizers"] = None  # an import now fails as if it were not installed
from pathlib import Path
from refinfer.errors import TokenizerError
from refinfer.model import tokenizer as tokenizer_module
from refinfer.model.tokenizer import load_tokenizer
for folder in sys.argv[1:]:
    try:
        print(load_tokenizer(Path(folder)).encode("ab c"))
    except TokenizerError as error:
        print(error)
"""


@pytest.mark.spec("TOKEN-2", "TOKEN-3")
def test_only_a_file_with_merges_needs_the_package_and_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    for name, raw in {"few": FEW, "bytes": BYTES, "merging": merging_json()}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    folders = [str(tmp_path / name) for name in ("few", "bytes", "merging")]
    command, root = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *folders], Path(refinfer.__file__).parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [
        "[0, 1, 2, 3]",
        "[97, 98, 32, 99]",
        (
            f"{folders[2]}/tokenizer.json needs the tokenizers package: pip install 'refinfer[hf]', "
            "or give the prompt as --token-ids"
        ),
    ]


@pytest.mark.spec("TOKEN-4")
@pytest.mark.parametrize("character", ["x", "A", "é", "\n", "😀", "\udc80"], ids=ascii)
def test_a_character_that_is_not_in_the_alphabet_is_refused_by_name(character: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(f"{character!r}; it knows only ' abc'")):
        load(FEW).encode("ab" + character)


@pytest.mark.spec("TOKEN-4")
@pytest.mark.parametrize("tokenizer", [BYTE_TOKENIZER, MERGING_TOKENIZER], ids=["bytes", "merges"])
def test_half_of_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="UTF-8"):
        tokenizer.encode("ab\udc80")


def stream_pieces(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, context)
    return [*map(stream.push, ids), stream.finish()]


BYTES_OF_CHARACTERS_AND_NOISE = st.lists(
    st.sampled_from([[*character.encode()] for character in "aé€😀\ufffd"])
    | st.lists(st.integers(120, 260), max_size=9)
).map(lambda parts: [byte for part in parts for byte in part])


@pytest.mark.spec("TOKEN-5")
@settings(max_examples=200)
@example([0x80] * 7 + [0xC3, 0xA9])
@given(BYTES_OF_CHARACTERS_AND_NOISE)
def test_streamed_bytes_only_ever_add_to_the_decoded_text_and_end_as_it(ids: list[int]) -> None:
    text = BYTE_TOKENIZER.decode(ids)
    shown = list(accumulate(stream_pieces(BYTE_TOKENIZER, ids)))
    assert all(text.startswith(so_far) for so_far in shown)
    assert shown[-1] == text


@pytest.mark.spec("TOKEN-5")
@given(st.lists(st.integers(0, 261)))
def test_streamed_tokens_of_the_package_end_as_the_decoded_text(ids: list[int]) -> None:
    assert "".join(stream_pieces(MERGING_TOKENIZER, ids)) == MERGING_TOKENIZER.decode(ids)


@pytest.mark.spec("TOKEN-5")
@given(TEXT.filter(lambda text: "\ufffd" not in text))
def test_a_character_is_shown_with_its_last_byte_and_not_later(text: str) -> None:
    pieces = [piece for c in text for piece in [""] * (len(c.encode()) - 1) + [c]]
    assert stream_pieces(BYTE_TOKENIZER, BYTE_TOKENIZER.encode(text)) == [*pieces, ""]


@pytest.mark.spec("TOKEN-5")
@given(TEXT, TEXT)
def test_a_stream_adds_what_comes_after_its_context(before: str, after: str) -> None:
    pieces = stream_pieces(BYTE_TOKENIZER, BYTE_TOKENIZER.encode(after), BYTE_TOKENIZER.encode(before))
    assert "".join(pieces) == after


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("byte", [0x80, 0xC3, 0xFF], ids=hex)
def test_bytes_of_no_text_are_shown_at_most_three_late(byte: int) -> None:
    stream, shown = TextStream(BYTE_TOKENIZER, BYTE_TOKENIZER.encode("a")), ""
    for n in range(1, 30):
        shown += stream.push(byte)
        assert n - 3 <= len(shown) <= n
    assert shown + stream.finish() == "\ufffd" * n


@pytest.mark.spec("TOKEN-5")
def test_half_a_character_before_ids_that_mean_nothing_is_shown_once_however_many_they_are() -> None:
    for n in range(80):
        ids = [*MERGING_TOKENIZER.encode("a"), 0x80, *[9999] * n]
        assert "".join(stream_pieces(MERGING_TOKENIZER, ids)) == MERGING_TOKENIZER.decode(ids) == "a\ufffd"


@pytest.mark.spec("TOKEN-5")
def test_a_word_is_streamed_as_it_is_written_after_its_context() -> None:
    words = load(word_json())
    assert stream_pieces(words, [0, 1]) == ["once", " upon", ""]
    assert stream_pieces(words, [1], context=[0]) == [" upon", ""]


MALFORMED = {
    "cut short": (b"{", "is not valid JSON"),
    "not UTF-8": (b'"\xff"', "is not valid JSON"),
    "too deep": (b"[" * 100_000, "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "array": (b"[]", "is not a usable tokenizer"),
    "null": (b"null", "is not a usable tokenizer"),
    "no model": (b"{}", "is not a usable tokenizer"),
}
MALFORMED_PARTS = {
    "model list": {"model": []},
    "unknown model": {"model": {"type": "Oracle"}},
    "vocab list": {"model": FEW["model"] | {"vocab": ["a", "b"]}},
    "vocab absent": {"model": {"type": "BPE", "merges": []}},
    "id text": {"model": FEW["model"] | {"vocab": {"a": "0"}}},
    "id negative": {"model": FEW["model"] | {"vocab": {"a": -1}}},
    "id fraction": {"model": FEW["model"] | {"vocab": {"a": 0.5}}},
    "merge of nothing": {"model": FEW["model"] | {"merges": [["x", "y"]]}},
    "unknown decoder": {"decoder": {"type": "Oracle"}},
    "decoder type list": {"decoder": {"type": []}},
    "decoder text": {"decoder": "Fuse"},
    "unknown normalizer": {"normalizer": {"type": "Oracle"}},
    "unknown pre-tokenizer": {"pre_tokenizer": {"type": "Oracle"}},
    "unknown version": {"version": "2.0"},
    "added tokens text": {"added_tokens": "ab"},
}


@pytest.mark.spec("TOKEN-6")
@pytest.mark.parametrize(("content", "why"), MALFORMED.values(), ids=MALFORMED)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json {why}"):
        load_tokenizer(tmp_path)


@pytest.mark.spec("TOKEN-6")
@pytest.mark.parametrize("part", MALFORMED_PARTS.values(), ids=MALFORMED_PARTS)
def test_a_tokenizer_with_a_malformed_part_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a usable tokenizer"):
        load(FEW | part)


def strip_decoder(start: int) -> dict[str, Any]:
    return FEW | {"decoder": {"type": "Strip", "content": "a", "start": start, "stop": 3}}


@pytest.mark.spec("TOKEN-6")
def test_a_panic_of_the_package_is_one_named_error() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a usable tokenizer: Precompiled"):
        load(FEW | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}})
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    for raw, text in ((strip_decoder(0), "ab"), (FEW | {"post_processor": template}, "ab")):
        try:
            tokenizer = load(raw)
            tokenizer.decode([*tokenizer.encode(text), 0, 1, 2])
            tokenizer.decode([])
        except TokenizerError as error:
            assert "\n" not in str(error)  # noqa: PT017  (some versions of the package do not mind)


@pytest.mark.spec("TOKEN-6")
def test_the_package_raises_what_ctrl_c_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: bytes) -> None:
        raise KeyboardInterrupt

    raw = merging_json()
    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_buffer=interrupted))
    with pytest.raises(KeyboardInterrupt):
        load(raw)


@pytest.mark.spec("TOKEN-2", "TOKEN-6")
@pytest.mark.parametrize("half", [0xD800, 0xDC80, 0xDFFF], ids=hex)
def test_half_of_a_surrogate_pair_in_the_alphabet_is_refused_as_the_package_does(tmp_path: Path, half: int) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(character_tokenizer_json("ab" + chr(half))))
    with pytest.raises(TokenizerError, match="is not a usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.spec("TOKEN-2", "TOKEN-3")
def test_a_file_of_more_than_4_megabytes_goes_to_the_package(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for spaces, kind in ((0, "CharacterTokenizer"), (4_000_000, "_PackageTokenizer")):
        path.write_text(json.dumps(FEW) + " " * spaces)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer is not None
        assert (type(tokenizer).__name__, tokenizer.encode("abc")) == (kind, [0, 1, 3])


@pytest.mark.spec("INPUT-1")
def test_a_file_of_more_than_64_megabytes_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 64_000_001)
    with pytest.raises(TokenizerError, match="cannot be read: it is larger than the 64 MB that such a file may have"):
        load_tokenizer(tmp_path)


@pytest.mark.spec("INPUT-3")
def test_only_a_part_of_a_large_alphabet_is_shown() -> None:
    with pytest.raises(TokenizerError, match=r"for the character 'a'; it knows only '.{30,40}\.\.\..{30,40}'$"):
        load(character_tokenizer_json([chr(i) for i in range(0x4E00, 0x9000)])).encode("a")


@pytest.mark.spec("TOKEN-6")
def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read: Is a directory"):
        load_tokenizer(tmp_path)


@pytest.mark.spec("TOKEN-6")
def test_a_model_without_a_tokenizer_file_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
