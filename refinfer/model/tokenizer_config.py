"""What `tokenizer_config.json` adds to a tokenizer: tokens that only it knows, and the template of a chat.

Reads them as `transformers` does. Leaves to others: adding the tokens (`tokenizer`), running a template (`chat`).
Read more: tutorial 07; clauses TOKEN-7, CHAT-1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from refinfer.errors import TokenizerError
from refinfer.units import shown
from refinfer.whole_file import read_json, read_whole

__all__ = ["TokenizerConfig", "load_chat_template", "load_tokenizer_config"]

TOKENIZER_CONFIG_NAME: Final = "tokenizer_config.json"
CHAT_TEMPLATE_NAME: Final = "chat_template.jinja"
_LARGEST_CONFIG_BYTES: Final = 16_000_000  # one with some thousands of reserved tokens has more than 1 MB
_LARGEST_TEMPLATE_BYTES: Final = 200_000
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")

TokenEntry = Mapping[str, Any]
"""A token and its flags: the arguments of `tokenizers.AddedToken`."""


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The parts of a tokenizer's config that change ids or prompts.

    `added` are the tokens with an id, in the order of the ids; `special` are those that are named without one. `names`
    gives the token of each role, such as `eos_token`. `chat_template` is None if the config contains no template.
    """

    added: tuple[TokenEntry, ...] = ()
    special: tuple[TokenEntry, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


def load_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read `tokenizer_config.json` in `folder`; it may be missing.

    Raises:
        TokenizerError: it cannot be read or is malformed.
    """
    raw = _read(folder / TOKENIZER_CONFIG_NAME)
    if not isinstance(raw, dict | None):
        raise TokenizerError(f"{folder / TOKENIZER_CONFIG_NAME} must hold a JSON object")
    raw = raw or {}
    named = {name: entry for name, value in raw.items() if name.endswith("_token") and (entry := _entry(value))}
    extra = [entry for value in _extra(raw) if (entry := _entry(value))]
    return TokenizerConfig(
        tuple(_added(raw.get("added_tokens_decoder"), folder / TOKENIZER_CONFIG_NAME)),
        tuple({"special": True} | entry for entry in [*named.values(), *extra]),
        {name: entry["content"] for name, entry in named.items()},
        _default_of(raw.get("chat_template")),
    )


def load_chat_template(folder: Path, config: TokenizerConfig) -> str | None:
    """Return the chat template of a model: `chat_template.jinja`, or else that of its config, or None.

    Raises:
        TokenizerError: it cannot be read, or is too long.
    """
    text = _read(folder / CHAT_TEMPLATE_NAME)
    template: str | None = config.chat_template if text is None else text
    if template is not None and len(template) > _LARGEST_TEMPLATE_BYTES:
        raise TokenizerError(f"{folder}: its chat template has more than {_LARGEST_TEMPLATE_BYTES:,} characters")
    return template


def _read(path: Path) -> Any:  # noqa: ANN401  (any JSON value, or a text)
    """Return the value or the text in a file, or None if there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        if path.suffix == ".json":
            return read_json(path, _LARGEST_CONFIG_BYTES)
        return read_whole(path, _LARGEST_TEMPLATE_BYTES).decode().replace("\r\n", "\n")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'text'}: {error}") from None


def _entry(value: object) -> dict[str, Any] | None:
    """Return a token that is written as a text, or as an object with its flags; None for anything else."""
    if isinstance(value, str):
        return {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    return {"content": value["content"]} | {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}


def _extra(raw: Mapping[str, Any]) -> list[Any]:
    """Return the special tokens without a role."""
    extra = raw.get("extra_special_tokens") or raw.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []


def _added(raw: object, path: Path) -> Iterator[TokenEntry]:
    """Yield the tokens with an id, in the order of the ids.

    Raises:
        TokenizerError: an id is not a number, or a token has no text.
    """
    if not isinstance(raw, dict | None):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object, not {shown(raw)}")
    for token_id in raw or {}:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 10):
            raise TokenizerError(f"{path}: added_tokens_decoder has {shown(token_id)} in the place of a token id")
    for token_id, value in sorted((raw or {}).items(), key=lambda item: int(item[0])):
        if (entry := _entry(value)) is None or not isinstance(value, dict):
            raise TokenizerError(f"{path}: added_tokens_decoder gives no token for id {token_id}")
        yield entry


def _default_of(templates: object) -> str | None:
    """Return the template, or of several with names the one called `default`."""
    if isinstance(templates, list):
        named = [t for t in templates if isinstance(t, dict) and t.get("name") == "default"]
        templates = named[-1].get("template") if named else None
    elif isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) else None
