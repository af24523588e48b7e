"""A model folder in Hugging Face's form, read before any weights are loaded, and checks of requests to its model.

Reads the config and the tokenizer, decides whether the two tables are one, and checks the tokens of a request.
Leaves to others: weights, chat templates (`chat`).
Read more: tutorial 00; clauses GEN-4, GEN-24, TOKEN-3, TENSOR-15, CHAT-1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from refinfer.errors import (
    ChatTemplateError,
    InputError,
    RequestError,
    SafetensorsError,
    TokenizerError,
    TokenizerPackageMissingError,
)
from refinfer.model.chat import render_chat
from refinfer.model.checkpoint import Checkpoint, open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.config_json import load_config
from refinfer.model.hub import find_model
from refinfer.model.tokenizer import Tokenizer, load_tokenizer
from refinfer.model.tokenizer_config import load_chat_template, load_tokenizer_config
from refinfer.units import is_whole, shown

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "DEFAULT_POSITIONS",
    "ModelFolder",
    "checked_token_ids",
    "open_folder",
    "open_weights",
    "readable",
]

DEFAULT_MAX_TOKENS: Final = 200
"""The default for the largest number of tokens to generate, if they fit."""

DEFAULT_POSITIONS: Final = 256
"""The positions that a run within a budget reserves, and that is planned for, by default: those tokens and a prompt."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The config and the tokenizer of a model folder; no weight has been read.

    `tokenizer` is None if the folder has no tokenizer or its package is missing; `why_no_tokenizer` gives the reason.
    Prompts can then be given as token ids. `warnings` are for whoever uses the model, each to be shown once.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    why_no_tokenizer: str
    warnings: tuple[str, ...] = ()

    def checkpoint(self) -> Checkpoint:
        """Open the weights: the tensors that the config asks for; reads headers only.

        Raises:
            InputError: the folder cannot be read, or has no weights that can be opened.
        """
        with readable(self.path):
            return open_checkpoint(self.path).of(self.config)

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of `prompt`.

        Raises:
            TokenizerError: the model has no tokenizer, or the text cannot be expressed.
        """
        if self.tokenizer is None:
            raise TokenizerError(self.why_no_tokenizer)
        return self.tokenizer.encode(prompt)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was taught to answer in a chat."""
        try:
            return load_chat_template(self.path, load_tokenizer_config(self.path)) is not None
        except TokenizerError:  # it has one, but not one that can be used
            return False

    def encode_chat(self, prompt: str, system: str | None, strftime_now: Callable[[str], str]) -> list[int]:
        """Return the token ids that ask for an answer to `prompt`, in the form of the model's chat template.

        `system` has instructions for the model, and `strftime_now` gives the time of day in a given form.

        Raises:
            TokenizerError: the model has no tokenizer, or the text cannot be expressed.
            ChatTemplateError: the model has no chat template, or it cannot be used.
        """
        if self.tokenizer is None:
            raise TokenizerError(self.why_no_tokenizer)
        config = load_tokenizer_config(self.path)
        template = load_chat_template(self.path, config)
        if template is None:
            raise ChatTemplateError(f"{self.path} has no chat template; give the prompt without --chat")
        text = render_chat(template, config.names, prompt, system, strftime_now)
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template has written them

    def ending_turns(self) -> ModelFolder:
        """Return this folder with the end token of its tokenizer's config among those that end a text."""
        end = load_tokenizer_config(self.path).names.get("eos_token")
        ids = self.tokenizer.encode(end, add_special_tokens=False) if self.tokenizer and end else []
        if len(ids) != 1 or ids[0] in self.config.eos_token_ids:
            return self
        return replace(self, config=replace(self.config, eos_token_ids=(*self.config.eos_token_ids, *ids)))

    def plan_request(self, prompt_token_ids: Sequence[int], max_tokens: int | None) -> int:
        """Return the number of tokens to generate, after checking the request; nothing has been reserved for it yet.

        A `max_tokens` of None means 200, or less if the context has less room.

        Raises:
            RequestError: no prompt, an id that is not in the vocabulary, `max_tokens` below 1, or more positions
                than the model has.
        """
        config = self.config
        n = len(prompt_token_ids)
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if outside := [i for i in prompt_token_ids if not 0 <= i < config.vocab_size]:
            raise RequestError(f"token id {shown(outside[0])} is not in the vocabulary of 0 to {config.vocab_size - 1}")
        if max_tokens is not None and not is_whole(max_tokens, 1):
            raise RequestError(f"max-tokens must be a whole number from 1 up, not {shown(max_tokens)}")
        room = config.longest_request - n
        if room < (max_tokens or 1):
            limit = "sliding window" if config.longest_request < config.max_position_embeddings else "context"
            raise RequestError(
                f"a prompt of {n} tokens and {shown(max_tokens or 1)} more do not fit this model's {limit} of "
                f"{config.longest_request} positions"
            )
        return int(max_tokens) if max_tokens is not None else min(DEFAULT_MAX_TOKENS, room)


def checked_token_ids(given: Iterable[Any]) -> list[int]:
    """Return token ids, such as those of a list or an array, as a list of whole numbers.

    Raises:
        RequestError: they are not a row of whole numbers.
    """
    row = isinstance(given, Iterable) and not isinstance(given, str | bytes) and getattr(given, "ndim", 1) == 1
    ids: list[Any] = [i.item() if getattr(i, "ndim", None) == 0 else i for i in given] if row else [given]
    if not row or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise RequestError(f"token_ids must be one row of whole numbers, not {' '.join(shown(given).split())}")
    return ids


def open_folder(model: str | os.PathLike[str]) -> ModelFolder:
    """Read the config and the tokenizer of a model, but no weights.

    `model` is a folder, or the name of a model that was downloaded from the Hugging Face Hub.

    Raises:
        ConfigError: the folder or its config is missing, unreadable or not supported.
        TokenizerError: the tokenizer is malformed.
    """
    path, warnings = find_model(model), list[str]()
    why = f"{path} has no tokenizer.json; give the prompt as --token-ids"
    tokenizer = None
    with readable(path):
        config = _config_as_stored(path, warnings.append)
        try:
            tokenizer = load_tokenizer(path)
        except TokenizerPackageMissingError as error:
            why = str(error)
    return ModelFolder(path, config, tokenizer, why, tuple(warnings))


def open_weights(model: str | os.PathLike[str]) -> Checkpoint:
    """Open the weights of a model, but not its tokenizer: the tensors that its config asks for; reads headers only.

    Raises:
        InputError: as `open_folder`, and `ModelFolder.checkpoint`.
    """
    path = find_model(model)
    with readable(path):
        return open_checkpoint(path).of(_config_as_stored(path, lambda message: None))


def _config_as_stored(path: Path, warn: Callable[[str], None]) -> ModelConfig:
    """Read the config; a model that has two tables stored has two tables, even if its config calls them one."""
    config = load_config(path, warn)
    try:
        has_both = config.tie_word_embeddings and open_checkpoint(path).has_both_tables
    except SafetensorsError:  # whoever needs the weights will say so
        return config
    if not has_both:
        return config
    warn(
        f"{path / 'config.json'} ties the output table to the embedding table, but the checkpoint has both, and both "
        "are used as stored; set tie_word_embeddings to false there to silence this warning"
    )
    return replace(config, tie_word_embeddings=False)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the system's error about a folder that cannot be read into one line.

    Raises:
        InputError: the folder cannot be read; the message gives the reason.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
