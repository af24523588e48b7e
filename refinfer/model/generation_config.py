"""A checkpoint's `generation_config.json`: how its authors want the next token to be chosen.

Reads the file as `transformers` does, and names what it asks for that is not done here. Leaves to others: end-of-text
ids (`config_json`), choosing a token (`sampler`).
Read more: tutorial 07; clauses SAMPLE-6 to SAMPLE-8.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from refinfer.errors import ConfigError
from refinfer.model.sampler import Sampling
from refinfer.units import shown
from refinfer.whole_file import read_json

__all__ = ["GenerationConfig", "read_generation_config"]

_NAME: Final = "generation_config.json"
_LARGEST_FILE_BYTES: Final = 1_000_000
_TOP_K: Final = 50  # the default of `transformers` for sampling

_NOT_APPLIED: Final[Mapping[str, tuple[float, ...]]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": (),
    "watermarking_config": (),
}
"""What changes the text in `transformers`, and is not implemented here: the values with which it changes nothing."""

_NOT_APPLIED_TO_DRAWS: Final[Mapping[str, tuple[float, ...]]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""The same, if tokens are drawn at random."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The object in a `generation_config.json`, and the name of the file; a null is the same as an absent key."""

    where: str
    raw: Mapping[str, Any]

    def sampling(
        self, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
    ) -> Sampling:
        """Return how to choose tokens; what is given here is preferred to what the file says.

        Without a temperature, tokens are drawn only if the file has `do_sample`. Then its temperature, `top_k` and
        `top_p` apply, which are 1, 50 and 1 by default. A `top_k` of 0 means all tokens.

        Raises:
            RequestError: a value given here is out of range.
            ConfigError: a value of the file that is needed is not of its kind, or out of range.
        """
        if temperature is None:
            temperature = self._number("temperature", 1.0, least=0.0) if self._draws() else 0.0
        if temperature == 0:
            return Sampling(temperature, top_k or None, top_p)
        if top_k is None:
            top_k = self._top_k()
        if top_p is None and (stored := self._number("top_p", 1.0, least=1e-30)) < 1:
            top_p = stored
        return Sampling(temperature, top_k or None, top_p)

    def not_applied(self, sampling: Sampling) -> list[str]:
        """Return what the file asks for that would change the text, but is not implemented: keys with their values."""
        neutral = _NOT_APPLIED if sampling.temperature == 0 else {**_NOT_APPLIED, **_NOT_APPLIED_TO_DRAWS}
        values = {key: self.raw.get(key) for key in neutral}
        return [
            f"{key} {shown(value, 40)}" for key, value in values.items() if value not in (None, [], {}, *neutral[key])
        ]

    def _draws(self) -> bool:
        value = self.raw.get("do_sample")
        if value not in (None, False, True) or isinstance(value, float):
            raise self.error("do_sample", "true or false")
        return bool(value)

    def _number(self, key: str, default: float, least: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not least <= value <= sys.float_info.max:
            raise self.error(key, "a number from 0 up" if least == 0 else "a number above 0")
        return float(value)

    def _top_k(self) -> int:
        value = self.raw.get("top_k")
        if value is None:
            return _TOP_K
        if type(value) is not int or value < 0:
            raise self.error("top_k", "a whole number from 0 up")
        return value

    def error(self, key: str, expected: str) -> ConfigError:
        """Return the error about a value that is not what is expected."""
        return ConfigError(f"{self.where}: {key} must be {expected}, not {shown(self.raw[key])}")


def read_generation_config(folder: Path) -> GenerationConfig:
    """Read a model folder's `generation_config.json`; one that is missing or damaged says nothing.

    Whoever opens the folder has reported the damage.
    """
    path = folder / _NAME
    try:
        raw = read_json(path, _LARGEST_FILE_BYTES)
    except (OSError, ValueError):
        raw = None
    return GenerationConfig(str(path), raw if isinstance(raw, dict) else {})
