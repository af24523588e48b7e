"""In the wild: what published checkpoints ask for in `generation_config.json`, and what the command line does then."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import refinfer
from command_line import json_of, refused, run
from refinfer.model.generation_config import GenerationConfig
from refinfer.model.sampler import Sampling
from refinfer.model.synth import write_checkpoint

GREEDY = Sampling()

# What such a file has, by the checkpoints that have it, and what it comes to when nothing is given.
MET: dict[str, tuple[dict[str, Any], Sampling]] = {
    "nothing but ids (Mistral 7B v0.1)": ({"bos_token_id": 1, "eos_token_id": 2}, GREEDY),
    "Llama 3.1 Instruct": ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 50, 0.9)),
    "Llama 2: a temperature, and no word on drawing": ({"temperature": 0.9, "top_p": 0.6}, GREEDY),
    "Qwen2.5 Instruct": (
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        Sampling(0.7, 20, 0.8),
    ),
    "Qwen3": ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, Sampling(0.6, 20, 0.95)),
    "Qwen2.5 base": ({"do_sample": False, "max_new_tokens": 2048}, GREEDY),
    "drawing, and nothing else": ({"do_sample": True}, Sampling(1.0, 50, None)),
    "nulls": ({"do_sample": True, "temperature": None, "top_k": None, "top_p": None}, Sampling(1.0, 50, None)),
    "a top-k of 0 is all": ({"do_sample": True, "top_k": 0}, Sampling(1.0, None, None)),
    "a top-p of 1 is all": ({"do_sample": True, "top_p": 1.0}, Sampling(1.0, 50, None)),
    "a temperature of 0": ({"do_sample": True, "temperature": 0, "top_k": 20}, GREEDY),
    "whole numbers": ({"do_sample": True, "temperature": 1, "top_p": 1}, Sampling(1.0, 50, None)),
}


@pytest.mark.spec("SAMPLE-6")
@pytest.mark.parametrize("name", MET)
def test_tokens_are_chosen_as_the_checkpoint_asks(name: str) -> None:
    raw, wanted = MET[name]
    assert GenerationConfig("generation_config.json", raw).sampling() == wanted


# What changes a text in `transformers` and is not applied here, and what only looks so.
ASKED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "neutral values": ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}, []),
    "empty values": ({"suppress_tokens": None, "bad_words_ids": [], "sequence_bias": {}}, []),
    "what is ours to say": ({"max_new_tokens": 7, "max_length": 20, "use_cache": False, "pad_token_id": 0}, []),
    "a penalty": ({"repetition_penalty": 1.05}, ["repetition_penalty 1.05"]),
    "beams and n-grams": (
        {"num_beams": 4, "no_repeat_ngram_size": 3},
        ["no_repeat_ngram_size 3", "num_beams 4"],
    ),
    "tokens that may not come": ({"suppress_tokens": [1, 2]}, ["suppress_tokens [1, 2]"]),
    "min-p, which greedy runs do not look at": ({"min_p": 0.05}, []),
    "min-p when drawing": ({"min_p": 0.05, "do_sample": True}, ["min_p 0.05"]),
    "neutral values when drawing": ({"min_p": 0.0, "typical_p": 1.0, "eta_cutoff": 0.0, "do_sample": True}, []),
}


@pytest.mark.spec("SAMPLE-8")
@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for_and_not_applied_is_named(name: str) -> None:
    raw, wanted = ASKED[name]
    found = GenerationConfig("generation_config.json", raw)
    assert found.not_applied(found.sampling()) == wanted


# The values with which `transformers` does nothing.
NEUTRAL = {
    **dict.fromkeys(
        ["repetition_penalty", "encoder_repetition_penalty", "num_beams", "guidance_scale", "typical_p"], 1
    ),
    **dict.fromkeys(["no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"], 0),
    **dict.fromkeys(["penalty_alpha", "min_p", "epsilon_cutoff", "eta_cutoff"], 0),
}


@pytest.mark.spec("SAMPLE-8")
@pytest.mark.parametrize(("key", "neutral"), NEUTRAL.items())
def test_every_value_but_the_one_that_does_nothing_is_named(key: str, neutral: int) -> None:
    for value in (0, 1, 2, 0.5):
        found = GenerationConfig("generation_config.json", {key: value, "do_sample": True})
        assert found.not_applied(found.sampling()) == ([] if value == neutral else [f"{key} {value}"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model that draws, with a penalty."""
    folder = tmp_path / "m"
    write_checkpoint(folder, refinfer.SHAPES["tiny"])
    about = {"do_sample": True, "temperature": 0.6, "top_k": 9, "repetition_penalty": 1.1, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.spec("SAMPLE-8")
def test_one_warning_names_all_of_it_and_quiet_does_not_hide_it(model: Path) -> None:
    status, _, err = run("generate", "a", "--model", model, "--max-tokens", 2, "-q")
    file = model / "generation_config.json"
    assert status == 0
    assert err == f"refinfer: warning: {file} asks for repetition_penalty 1.1 and min_p 0.1, not applied here\n"


@pytest.mark.spec("SAMPLE-6", "CLI-2")
def test_the_command_line_follows_the_file_and_a_session_is_greedy_until_told(model: Path) -> None:
    status, out, _ = run("generate", "a", "--model", model, "--max-tokens", 12, "--seed", 3, "--json")
    found = json.loads(out)
    assert (status, found["sampling"]) == (0, {"temperature": 0.6, "top_k": 9, "top_p": None, "seed": 3})
    with refinfer.load(model, weight_cache=":memory") as session:
        drawn = "".join(session.generate("a", max_tokens=12, temperature=0.6, top_k=9, seed=3))
        greedy = "".join(session.generate("a", max_tokens=12))
        assert greedy == "".join(session.generate("a", max_tokens=12, temperature=0.0))
    assert found["text"] == drawn != greedy
    _, out, _ = run("generate", "a", "--model", model, "--max-tokens", 12, "--temperature", 0, "--json")
    assert json.loads(out)["text"] == greedy
    assert json.loads(out)["sampling"] == {"temperature": 0.0, "top_k": None, "top_p": None, "seed": None}


@pytest.mark.spec("CLI-32")
def test_the_summary_prints_the_seed_that_was_drawn_and_it_gives_the_text_again() -> None:
    _, out, err = run("generate", "JULIET:", "--max-tokens", 40)
    seed = re.search(r" · seed (\d+)\n", err)
    assert seed is not None
    status, again, err = run("generate", "JULIET:", "--max-tokens", 40, "--seed", seed[1])
    assert (status, again) == (0, out)
    assert "seed" not in err
    texts = {run("generate", "JULIET:", "--max-tokens", 40, "-q")[1] for _ in range(3)}
    assert len(texts) == 3
    drawn = json_of("generate", "JULIET:", "--max-tokens", "40")
    again = json_of("generate", "JULIET:", "--max-tokens", "40", "--seed", drawn["sampling"]["seed"])["text"]
    assert again == drawn["text"]


@pytest.mark.spec("CLI-32")
def test_a_greedy_summary_has_no_seed() -> None:
    _, _, err = run("generate", "JULIET:", "--max-tokens", 3, "--temperature", 0)
    assert "3 tokens" in err
    assert "seed" not in err


@pytest.mark.spec("CLI-32")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--seed", "3"], "--seed"),
        (["--top-k", "5"], "--top-k"),
        (["--top-k", "0"], "--top-k"),
        (["--top-p", "0.5"], "--top-p"),
        (["--top-k", "5", "--top-p", "0.5", "--seed", "3"], "--top-k and --top-p and --seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_drawing_are_refused_if_the_result_is_greedy(options: list[str], names: str, model: Path) -> None:
    why = f"refinfer: {names} would change nothing, because the likeliest token is always taken here; "
    assert refused("generate", "ROMEO:", "--temperature", 0, *options).startswith(why)
    (model / "generation_config.json").unlink()
    assert refused("generate", "a", "--model", model, *options).startswith(why)
    assert run("generate", "a", "--model", model, *options, "--temperature", 1, "--max-tokens", 1)[0] == 0
