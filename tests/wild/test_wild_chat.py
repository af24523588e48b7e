"""Chats as people have them: checkpoints in the manner of Llama 3, Qwen2.5, Qwen3 and Mistral, asked one question.

What `transformers` makes of the same files is in tests/golden/chat, written by tests/golden/make_chat_goldens.py.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from refinfer import clock
from refinfer.errors import ChatTemplateError, InputError, TokenizerError
from refinfer.generate import load
from refinfer.model.config import ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from command_line import refused, run

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
CASES = {
    f"{folder.name}: {name}": (folder.name, case)
    for folder in sorted(GOLDEN.iterdir())
    for name, case in json.loads((folder / "golden.json").read_text()).items()
}
CHATS = {name: (manner, case) for name, (manner, case) in CASES.items() if "text" in case}
NOW = datetime(2025, 3, 9, 12, 30)  # noqa: DTZ001  (a local time, as the template sees one)
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>"}


@pytest.fixture(scope="module", params=ENDS)
def manner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """A tiny random checkpoint with the tokenizer and the template of one manner; not to be written to."""
    return checkpoint(tmp_path_factory.mktemp("models") / request.param, tiny_config)


def checkpoint(folder: Path, tiny_config: ModelConfig) -> Path:
    config = replace(tiny_config, vocab_size=300, max_position_embeddings=1024, eos_token_ids=(7,))
    write_checkpoint(folder, config, dtype="f32", seed=3)
    for file in (GOLDEN / folder.name).iterdir():
        shutil.copy(file, folder)
    return folder


def chat_ids(folder: Path, prompt: str, system: str | None = None) -> list[int]:
    return open_folder(folder).encode_chat(prompt, system, NOW.strftime)


@pytest.mark.spec("CHAT-1", "CHAT-2", "CHAT-3")
@pytest.mark.parametrize(("name", "case"), CHATS.values(), ids=CHATS)
def test_a_question_has_the_ids_and_the_text_that_transformers_gives_it(
    name: str, case: dict[str, Any], tmp_path: Path, tiny_config: ModelConfig
) -> None:
    model = open_folder(checkpoint(tmp_path / name, tiny_config))
    ids = model.encode_chat(case["prompt"], case["system"], NOW.strftime)
    assert ids == case["ids"]
    assert model.tokenizer is not None
    assert model.tokenizer.decode(ids) == case["decoded"]
    assert model.tokenizer.encode(case["text"], add_special_tokens=False) == ids


@pytest.mark.spec("TOKEN-7")
@pytest.mark.parametrize(("name", "case"), [case for case in CASES.values() if "text" not in case[1]], ids=sorted(ENDS))
def test_a_text_with_tokens_that_only_the_tokenizers_config_has_gets_the_ids_of_transformers(
    name: str, case: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(GOLDEN / name)
    assert tokenizer is not None
    assert tokenizer.encode(case["prompt"]) == case["ids"]


@pytest.mark.spec("CHAT-1", "CHAT-5")
def test_the_command_prints_the_answer_only(manner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.RealClock, "local_time", lambda _, form: NOW.strftime(form))
    asked = ["generate", "What is it?", "--model", manner, "--chat", "--system", "Be brief.", "--max-tokens", 9]
    status, out, err = run(*asked, "--weight-cache", ":memory")
    assert status == 0, err
    assert "hint" not in err
    assert "What is it?" not in out
    ids = chat_ids(manner, "What is it?", "Be brief.")
    with load(manner, weight_cache=":memory") as session:
        assert out == "".join(session.generate(token_ids=ids, max_tokens=9)) + "\n"
    as_json = json.loads(run(*asked, "--weight-cache", ":memory", "--json")[1])
    assert as_json["prompt_token_ids"] == ids


@pytest.mark.spec("CHAT-3")
def test_the_command_reads_its_own_clock(manner: Path) -> None:
    before = clock.RealClock().local_time("%Y-%m-%d")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", before)
    asked = run("generate", "hi", "--model", manner, "--chat", "--max-tokens", 1, "--weight-cache", ":memory", "--json")
    ids = json.loads(asked[1])["prompt_token_ids"]
    dates = {clock.RealClock().local_time("%d %b %Y"), datetime.now().strftime("%d %b %Y")}  # noqa: DTZ005
    tokenizer = load_tokenizer(manner)
    assert tokenizer is not None
    assert ("Today Date: " in tokenizer.decode(ids)) == any(date in tokenizer.decode(ids) for date in dates)


@pytest.mark.spec("CHAT-5")
def test_an_answer_also_ends_at_the_end_token_of_the_tokenizers_config(manner: Path) -> None:
    model = open_folder(manner)
    assert model.config.eos_token_ids == (7,)
    assert model.tokenizer is not None
    end = model.tokenizer.encode(ENDS[manner.name], add_special_tokens=False)
    assert len(end) == 1
    assert model.ending_turns().config.eos_token_ids == (7, *end)
    assert model.ending_turns().ending_turns() == model.ending_turns()


@pytest.mark.spec("CHAT-5")
@pytest.mark.parametrize("lacks", ["an end token", "a tokenizer"])
def test_an_answer_ends_as_any_text_does_if_no_end_token_is_named_for_it(
    lacks: str, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    folder = checkpoint(tmp_path / "qwen3", tiny_config)
    if lacks == "a tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        with_config(folder, {"eos_token": None})
    model = open_folder(folder)
    assert model.ending_turns() is model


@pytest.mark.spec("CHAT-6")
def test_a_prompt_without_chat_gets_one_line_that_says_what_chat_does(manner: Path) -> None:
    asked = ["generate", "--model", manner, "--max-tokens", 1, "--weight-cache", ":memory"]
    status, out, err = run(*asked, "hello")
    assert status == 0
    assert out.startswith("hello")
    assert [line for line in err.splitlines() if "--chat" in line] == [
        "hint: this model was taught to chat; --chat puts the prompt into its chat template"
    ]
    assert "hint" not in run(*asked, "--token-ids", "1,2")[2]
    assert "hint" not in run("generate", "ROMEO:", "--max-tokens", 1)[2]


WRONG_USES = {
    "no question": (["--chat"], "--chat needs a prompt"),
    "ids": (["--chat", "--token-ids", "1,2"], "--chat needs a prompt"),
    "a system alone": (["hi", "--system", "Be brief."], "--system can be used only in a chat; give --chat too"),
    "a model that does not chat": (["hi", "--chat"], "has no chat template; give the prompt without --chat"),
}


@pytest.mark.spec("CHAT-6")
@pytest.mark.parametrize(("argv", "why"), WRONG_USES.values(), ids=WRONG_USES)
def test_a_chat_is_refused_in_one_line_for(argv: list[str], why: str) -> None:
    assert why in refused("generate", *argv)


@pytest.mark.spec("CHAT-6")
def test_without_a_tokenizer_there_is_no_chat(tmp_path: Path, tiny_config: ModelConfig) -> None:
    folder = checkpoint(tmp_path / "qwen3", tiny_config)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        chat_ids(folder, "hi")


def with_config(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


SOURCES = {
    "a text": ("{{ messages[0].content }}!", "hi!"),
    "a list": ([{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
    "an object": ({"tool_use": "no", "default": "yes"}, "yes"),
}


@pytest.mark.spec("CHAT-1")
@pytest.mark.parametrize(("template", "text"), SOURCES.values(), ids=SOURCES)
def test_a_template_of_the_config_is(template: object, text: str, tmp_path: Path, tiny_config: ModelConfig) -> None:
    folder = with_config(checkpoint(tmp_path / "qwen3", tiny_config), {"chat_template": template})
    model = open_folder(folder)
    assert model.has_chat_template
    assert model.encode_chat("hi", None, str) == model.encode(text)
    (folder / "chat_template.jinja").write_text("of the file\n")
    assert model.encode_chat("hi", None, str) == model.encode("of the file")


@pytest.mark.spec("CHAT-6")
@pytest.mark.parametrize("template", [None, 3, [], {}, [{"name": "rag", "template": "a"}], ["default"], {"default": 1}])
def test_no_template_is(template: object, tmp_path: Path, tiny_config: ModelConfig) -> None:
    model = open_folder(with_config(checkpoint(tmp_path / "qwen3", tiny_config), {"chat_template": template}))
    assert not model.has_chat_template
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        model.encode_chat("hi", None, str)


@pytest.mark.spec("CHAT-4", "INPUT-1")
@pytest.mark.parametrize("content", [b"\xff", b"x" * 200_001], ids=["not UTF-8", "too long"])
def test_a_damaged_template_stops_a_chat_and_nothing_else(
    content: bytes, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    folder = checkpoint(tmp_path / "qwen3", tiny_config)
    (folder / "chat_template.jinja").write_bytes(content)
    model = open_folder(folder)
    assert len(model.encode("a")) == 1
    assert not model.has_chat_template
    with pytest.raises(InputError, match="chat"):
        model.encode_chat("hi", None, str)


@pytest.mark.spec("CHAT-4")
@pytest.mark.parametrize(("length", "why"), [(200_000, None), (200_001, "more than 200,000 characters")], ids=str)
def test_a_template_of_the_config_may_be_as_long_as_one_in_a_file(
    length: int, why: str | None, tmp_path: Path, tiny_config: ModelConfig
) -> None:
    model = open_folder(with_config(checkpoint(tmp_path / "qwen3", tiny_config), {"chat_template": "x" * length}))
    assert model.has_chat_template is (why is None)
    if why is None:
        assert model.encode_chat("hi", None, str) == model.encode("x" * length)
    else:
        with pytest.raises(InputError, match=why):
            model.encode_chat("hi", None, str)


MALFORMED = {
    "no JSON": "{",
    "a list": "[]",
    "ids that are none": '{"added_tokens_decoder": {"x": {"content": "a"}}}',
    "negative ids": '{"added_tokens_decoder": {"-1": {"content": "a"}}}',
    "tokens without a text": '{"added_tokens_decoder": {"300": {}}}',
    "tokens that are none": '{"added_tokens_decoder": {"300": 5}}',
    "a list of tokens": '{"added_tokens_decoder": []}',
}


@pytest.mark.spec("TOKEN-7")
@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_tokenizer_config_is_refused_by_name(content: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "qwen3" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


ADDED = {
    "of a role": {"eos_token": "<end>"},
    "of a role, as an object": {"eos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": False}},
    "extra": {"extra_special_tokens": ["<end>"]},
    "extra, by a name": {"extra_special_tokens": {"end_token": "<end>"}},
    "additional": {"additional_special_tokens": ["<end>"]},
    "with an id": {"added_tokens_decoder": {"261": {"content": "<end>", "special": True}}},
}


@pytest.mark.spec("TOKEN-7", "TOKEN-2")
@pytest.mark.parametrize("config", ADDED.values(), ids=ADDED)
def test_a_token_that_only_the_config_has_is_one_token_without_a_text(config: dict[str, Any], tmp_path: Path) -> None:
    plain = json.loads((GOLDEN / "qwen3" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain | {"added_tokens": []}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("a<end>b") == [tokenizer.encode("a")[0], 256, tokenizer.encode("b")[0]]
    assert tokenizer.decode(tokenizer.encode("a<end>b")) == "ab"
    (tmp_path / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path)
    assert bare is not None
    assert len(bare.encode("<end>")) == 5
