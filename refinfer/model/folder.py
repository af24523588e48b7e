"""A model folder in Hugging Face's form, looked at before anything is loaded, and what can be asked of its model.

Knows: the config, the tokenizer, how many tokens a request may have. Does not know: weights.
Spec: GEN-4, TOKEN-3. Tutorial: 00.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from refinfer.errors import InputError, RequestError, TokenizerError, TokenizerPackageMissingError
from refinfer.model.config import ModelConfig
from refinfer.model.config_json import load_config
from refinfer.model.tokenizer import Tokenizer, load_tokenizer

__all__ = ["DEFAULT_MAX_TOKENS", "ModelFolder", "open_folder", "readable"]

DEFAULT_MAX_TOKENS: Final = 200
"""How many tokens are generated where nobody says, if they fit."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder that has been looked at: its config and tokenizer; no weight has been read.

    `tokenizer` is None where there is none or its package is missing, as `why_no_tokenizer` says; token ids work all
    the same.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    why_no_tokenizer: str

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of `prompt`.

        Raises:
            TokenizerError: the model has no tokenizer, or the text cannot be expressed.
        """
        if self.tokenizer is None:
            raise TokenizerError(self.why_no_tokenizer)
        return self.tokenizer.encode(prompt)

    def plan_request(self, prompt_token_ids: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens to generate; checks the request before anything is reserved for it.

        `max_tokens` None means 200, or as many as the context has room for.

        Raises:
            RequestError: no prompt, an id that is not in the vocabulary, `max_tokens` below 1, or more positions
                than the model has.
        """
        config = self.config
        n = len(prompt_token_ids)
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if outside := [i for i in prompt_token_ids if not 0 <= i < config.vocab_size]:
            raise RequestError(f"token id {outside[0]} is not in the vocabulary of 0 to {config.vocab_size - 1}")
        if max_tokens is not None and max_tokens < 1:
            raise RequestError(f"max-tokens must be at least 1, not {max_tokens}")
        room = config.longest_request - n
        if room < (max_tokens or 1):
            limit = "sliding window" if config.longest_request < config.max_position_embeddings else "context"
            raise RequestError(
                f"a prompt of {n} tokens and {max_tokens or 1} more do not fit this model's {limit} of "
                f"{config.longest_request} positions"
            )
        return max_tokens if max_tokens is not None else min(DEFAULT_MAX_TOKENS, room)


def open_folder(path: Path) -> ModelFolder:
    """Read the config and the tokenizer of a model folder, but no weights.

    Raises:
        ConfigError: the folder or its config is missing, unreadable or not supported.
        TokenizerError: the tokenizer is malformed.
    """
    why = f"{path} has no tokenizer.json; give the prompt as --token-ids"
    tokenizer = None
    with readable(path):
        config = load_config(path)
        try:
            tokenizer = load_tokenizer(path)
        except TokenizerPackageMissingError as error:
            why = str(error)
    return ModelFolder(path, config, tokenizer, why)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a folder it will not let us look into into one line.

    Raises:
        InputError: there is no permission, a name is too long, or the like.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
