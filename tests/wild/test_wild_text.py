"""Texts as people's models write them, streamed by every kind of tokenizer that published checkpoints have.

The tokenizers are made here, tiny: those of Llama 2 and Mistral 7B, which fall back to bytes; of TinyLlama and Gemma;
those over bytes, of Llama 3 and Qwen; those that mark where words go on, and those that mark nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from refinfer.model.tokenizer import TextStream, Tokenizer, load_tokenizer

TEXTS = {
    "Chinese": "你好，世界。今天天气很好",
    "Japanese": "こんにちは世界。元気ですか",
    "Hangul": "안녕하세요 세계 여러분",
    "Devanagari": "नमस्ते दुनिया कैसे हैं",
    "joined emoji": "family 👨‍👩‍👧‍👦 and 🏳️‍🌈 and 👍🏽",
    "combining marks": "e\u0301 a\u0308\u0323 o\u0302\u0301 naïve",
    "mixed": "The word 水 is water, 불 is fire, and é is é. 🔥!",
    "ASCII": "Once upon a time, there was a king.",
    "spaces and lines": "  two  three   \n\n\tx ",
    "the replacement character": "a\ufffdb\ufffd\ufffd\ufffd水\ufffd",
}

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


LETTER = byte_letters()


def falling_back(
    decoder: list[Any], words: Sequence[str] = ("▁", "▁a", "an", "▁the", "水", ".")
) -> tokenizers.Tokenizer:
    """Return a tokenizer of few words, which writes everything else in bytes."""
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, *map(chr, range(33, 127)), "▁", "▁a", "an", "水"])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "n")]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(decoder)
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


def over_bytes() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer with merges, some of which end within a character."""
    vocab = {letter: i for i, letter in enumerate(LETTER.values())}
    merges = []
    for pair in ((b"\xe4", b"\xbd"), (b"\xa0", b"\xe5"), (b"\xf0", b"\x9f"), (b" ", b"\xf0\x9f"), (b"\x8d", b"\xe2")):
        left, right = ("".join(LETTER[byte] for byte in part) for part in pair)
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    return inner


def of_words(decoder: Any, inside: str) -> tokenizers.Tokenizer:
    """Return a tokenizer of whole characters; those within a word are written after `inside`."""
    characters = sorted({c for text in TEXTS.values() for c in text if not c.isspace()} | {"\u2581"})
    pieces = ["[UNK]", *dict.fromkeys([*characters, *(inside + c for c in characters)])]
    inner = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]", continuing_subword_prefix=inside)
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoder
    return inner


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
KINDS = {
    "Llama 2: replaced, fallen back, fused, stripped": falling_back(LLAMA),
    "Gemma: replaced, fallen back, fused": falling_back(LLAMA[:3]),
    "metaspace after bytes": falling_back([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
    "metaspace before bytes": falling_back([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]),
    "bytes only": falling_back([decoders.ByteFallback(), decoders.Fuse()]),
    "Llama 3 and Qwen: over bytes": over_bytes(),
    "BERT: parts of words": of_words(decoders.WordPiece("##"), "##"),
    "no decoder but fusing": of_words(decoders.Fuse(), ""),
}


class Loaded:
    """A tokenizer as refinfer loads it, which counts the ids that it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(KINDS[request.param].to_str(), encoding="utf-8")
    loaded = load_tokenizer(folder)
    assert loaded is not None
    return Loaded(loaded)


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.push, ids), stream.finish()])


def ends_between_characters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return how many ids of a text encode its first characters, for any number of them."""
    ids = tokenizer.encode(text)
    beginnings = (tokenizer.encode(text[:n]) for n in range(len(text) + 1))
    return sorted({len(beginning) for beginning in beginnings if ids[: len(beginning)] == beginning})


def require_streamed_after_any_prompt(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for end in ends_between_characters(tokenizer, text):
        assert streamed(tokenizer, ids[:end], ids[end:]) == whole[len(tokenizer.decode(ids[:end])) :]


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_is_streamed_wherever_between_its_characters_the_prompt_ends(tokenizer: Loaded, text: str) -> None:
    assert len(ends_between_characters(tokenizer, text)) > 3
    require_streamed_after_any_prompt(tokenizer, text)


PARTS = st.sampled_from([*(part for text in TEXTS.values() for part in text.split()), *" a.水\n\u0301\u200d\ufffd👍"])


@pytest.mark.spec("TOKEN-5")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PARTS, max_size=12).map("".join))
def test_any_text_is_streamed_wherever_between_its_characters_the_prompt_ends(tokenizer: Loaded, text: str) -> None:
    require_streamed_after_any_prompt(tokenizer, text)


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("text", [text for text in TEXTS.values() if "\ufffd" not in text], ids=ascii)
def test_a_character_that_the_prompt_begins_is_shown_whole(tokenizer: Loaded, text: str) -> None:
    ids = tokenizer.encode(text)
    whole, shown = tokenizer.decode(ids), ""
    for end in range(len(ids)):
        prompt = tokenizer.decode(ids[:end])
        shown = max(shown, prompt.rstrip("\ufffd") if whole.startswith(prompt.rstrip("\ufffd")) else "", key=len)
        assert streamed(tokenizer, ids[:end], ids[end:]) == whole[len(shown) :]


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_no_piece_holds_half_a_character_and_none_is_held_back_for_long(tokenizer: Loaded, text: str) -> None:
    ids = tokenizer.encode(text)
    whole, stream, shown = tokenizer.decode(ids), TextStream(tokenizer), ""
    for n, token_id in enumerate(ids, start=1):
        shown += stream.push(token_id)
        assert whole.startswith(shown)
        earlier = tokenizer.decode(ids[: max(0, n - 3)]).rstrip("\ufffd")
        assert len(shown) >= len(earlier) or not whole.startswith(earlier)
    assert shown + stream.finish() == whole


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_cut_ending_is_flushed(tokenizer: Loaded, text: str) -> None:
    ids = tokenizer.encode(text)
    for end in range(len(ids)):
        done = streamed(tokenizer, [], ids[:end])
        begun = max(place for place in ends_between_characters(tokenizer, text) if place <= end)
        whole = tokenizer.decode(ids[:begun])
        assert done.startswith(whole)
        assert (len(done) > len(whole)) == (len(tokenizer.decode(ids[:end])) > len(whole))


@pytest.mark.spec("TOKEN-5")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([3 + 0xE6, 3 + 0xB0, 3 + 0xB4, 3 + 0xFF, 270, 3 + 0xE6, 3 + 0xB0, 3 + 0xB4])
@example([3 + 0xFF] * 70 + [270])
@example([1] * 70 + [270])
@given(st.lists(st.integers(0, 300), max_size=80))
def test_ids_of_no_text_are_streamed_without_taking_anything_back(tokenizer: Loaded, ids: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert stream.finish() == ""
    text, shown = tokenizer.decode(ids), "".join(pieces)
    known = "".join(text.split("\ufffd"))
    assert len(shown) <= len(ids) * 8
    assert all(c in shown for c in known)


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("text", [*TEXTS.values(), "\ufffd"], ids=[*TEXTS, "only the replacement character"])
def test_decoding_an_id_takes_no_longer_the_longer_the_text_is(tokenizer: Loaded, text: str) -> None:
    ids = tokenizer.encode(text * (3000 // len(text)))
    stream = TextStream(tokenizer, ids[:50])
    spent = []
    for token_id in ids[50:2000]:
        before = tokenizer.decoded
        stream.push(token_id)
        spent.append(tokenizer.decoded - before)
    assert max(spent[4:], default=0) <= 100


@pytest.mark.spec("TOKEN-5")
@pytest.mark.parametrize("noise", [[3 + 0xFF], [1], [3 + 0xE6], [299]], ids=str)
def test_nor_do_ids_that_mean_nothing(tokenizer: Loaded, noise: list[int]) -> None:
    stream = TextStream(tokenizer)
    before = tokenizer.decoded
    for token_id in noise * 2000:
        stream.push(token_id)
    assert tokenizer.decoded - before <= 2000 * 120
