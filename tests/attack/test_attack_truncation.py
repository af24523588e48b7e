"""Attacks on a cache file in use: it is cut short at any moment, as only root or a change of its mode allows."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import refinfer
from cage import Cases
from children import Child, Say, watched
from refinfer.errors import RefinferError
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint

pytestmark = pytest.mark.attack

TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with more weights than a processor's caches hold."""
    folder = tmp_path_factory.mktemp("models") / "model"
    write_checkpoint(folder, replace(SHAPES["tiny"], hidden_size=256, num_hidden_layers=8), dtype="f32", seed=1)
    return folder


def ids_of(model: Path, cache: Path, budget: str | None) -> tuple[int, ...]:
    with refinfer.load(model, weight_cache=cache, budget=budget, max_positions=TOKENS + 2) as session:
        for _ in session.generate(token_ids=[1, 2], max_tokens=TOKENS):
            pass
        assert session.stats is not None
        return session.stats.token_ids


@pytest.mark.spec("FILE-14", "OFFLOAD-5", "FETCH-9", "GEN-17")
@pytest.mark.parametrize("budget", [None, "60%"], ids=["mapped", "within a budget"])
def test_a_file_that_is_cut_ends_the_run_and_never_gives_other_tokens(
    cases: Cases, model: Path, tmp_path: Path, budget: str | None
) -> None:
    cache = tmp_path / "model.packed"
    expected = ids_of(model, cache, budget)
    size = cache.stat().st_size
    ends: Counter[str] = Counter()
    for rng in cases:

        def generate(say: Say) -> None:
            faulthandler.disable()
            with refinfer.load(model, weight_cache=cache, budget=budget, max_positions=TOKENS + 2) as session:
                assert session.weight_cache.state == "loaded"
                say("loaded")
                try:
                    for _ in session.generate(token_ids=[1, 2], max_tokens=TOKENS):
                        pass
                except RefinferError as error:
                    say(f"error: {error}")
                else:
                    assert session.stats is not None
                    say(f"tokens: {session.stats.token_ids}")

        with watched():
            child = Child(generate)
            assert child.hear() == "loaded"
            time.sleep(rng.uniform(0.0, 0.02))
            cache.chmod(0o600)
            os.truncate(cache, rng.randrange(size))
            said = child.hear()
            status = child.end()
        if said.startswith("tokens: "):  # it had ended before, or was repaired before its first token
            assert (status, said) == (0, f"tokens: {expected}")
        elif said:
            assert status == 0
            assert "cut short" in said or "bytes instead of" in said, said
        else:
            assert status == -signal.SIGBUS
            assert budget is None, "nothing is mapped within a budget"
        ends[said.split(":")[0] or "SIGBUS"] += 1
        assert ids_of(model, cache, budget) == expected
    print(dict(ends))
