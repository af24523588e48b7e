"""What a checkpoint's `generation_config.json` says about choosing tokens, and who wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.errors import ConfigError, RefinferError, RequestError
from refinfer.generate import STORYTELLER
from refinfer.model.generation_config import GenerationConfig, read_generation_config
from refinfer.model.sampler import Sampling

GREEDY = Sampling()


def config(**raw: Any) -> GenerationConfig:
    return GenerationConfig("a/generation_config.json", raw)


@pytest.mark.spec("SAMPLE-6")
@pytest.mark.parametrize(
    "given_options",
    [
        {"temperature": 0.5},
        {"temperature": 0.5, "top_k": 7},
        {"temperature": 0.5, "top_k": 0},
        {"temperature": 0.5, "top_p": 0.3},
        {"temperature": 0.5, "top_p": 1.0},
        {"top_k": 7, "top_p": 0.3},
    ],
    ids=str,
)
def test_an_option_wins_and_the_file_has_the_rest(given_options: dict[str, Any]) -> None:
    found = config(do_sample=True, temperature=0.8, top_k=20, top_p=0.9).sampling(**given_options)
    wanted = {"temperature": 0.8, "top_k": 20, "top_p": 0.9} | given_options
    assert found == Sampling(wanted["temperature"], wanted["top_k"] or None, wanted["top_p"])


@pytest.mark.spec("SAMPLE-6")
def test_a_temperature_given_draws_even_if_the_file_does_not_and_zero_is_greedy_even_if_it_does() -> None:
    assert config().sampling(0.7) == Sampling(0.7, 50, None)
    assert config(do_sample=True).sampling(0.0) == GREEDY


@pytest.mark.spec("SAMPLE-7")
@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"do_sample": 0.0}, "do_sample must be true or false"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number from 0 up, not 'hot'"),
        ({"do_sample": True, "temperature": -1}, "temperature must be a number from 0 up"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature must be a number from 0 up"),
        ({"do_sample": True, "temperature": 10**400}, "temperature must be a number from 0 up"),
        ({"do_sample": True, "temperature": True}, "temperature must be a number from 0 up"),
        ({"do_sample": True, "top_k": 2.5}, "top_k must be a whole number from 0 up, not 2.5"),
        ({"do_sample": True, "top_k": -1}, "top_k must be a whole number from 0 up"),
        ({"do_sample": True, "top_p": 0}, "top_p must be a number above 0"),
        ({"do_sample": True, "top_p": 10**400}, "top_p must be a number above 0"),
        ({"do_sample": True, "top_p": [1]}, "top_p must be a number above 0"),
    ],
    ids=str,
)
def test_a_value_that_is_not_of_its_kind_is_refused_by_its_name(raw: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**raw).sampling()
    assert str(refused.value).startswith(f"a/generation_config.json: {why}")


@pytest.mark.spec("SAMPLE-7")
def test_a_value_that_an_option_replaces_or_that_nobody_needs_is_not_looked_at() -> None:
    wrong = {"do_sample": "?", "temperature": "?", "top_k": "?", "top_p": "?"}
    assert config(**wrong).sampling(0.5, 3, 0.5) == Sampling(0.5, 3, 0.5)
    assert config(**wrong | {"do_sample": False}).sampling() == GREEDY


@pytest.mark.spec("SAMPLE-5", "SAMPLE-6")
@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": 1.0, "top_p": 2.0}, {"top_p": 0.0}], ids=str
)
def test_an_option_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=r"temperature must be|top-p must be"):
        config(do_sample=True).sampling(**options)  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
KEYS = ["do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_p", "bad_words_ids"]


@pytest.mark.spec("SAMPLE-7", "INPUT-2")
@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_values_give_a_choice_or_one_named_error(raw: dict[str, Any]) -> None:
    try:
        sampling = config(**raw).sampling()
    except RefinferError as error:
        assert len(str(error)) < 300  # noqa: PT017  (either outcome is right)
        return
    assert all(len(line) < 100 for line in config(**raw).not_applied(sampling))


@pytest.mark.spec("SAMPLE-7")
@pytest.mark.parametrize("text", [None, "", "{", "[]", '"x"', "[" * 100_000], ids=["missing", *"abcde"])
def test_a_file_that_is_missing_or_damaged_says_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert read_generation_config(tmp_path).sampling() == GREEDY


@pytest.mark.spec("SAMPLE-6")
def test_the_storyteller_asks_to_be_drawn_from(tmp_path: Path) -> None:
    assert read_generation_config(STORYTELLER).sampling() == Sampling(0.5, 50, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert read_generation_config(tmp_path).where == str(tmp_path / "generation_config.json")
