"""What the tests share: the specification's marks, models to test with, and a browser."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import SystemRandom
from typing import Any

import hypothesis
import pytest
from threadpoolctl import threadpool_limits

import refinfer
from browser import Browser, find_chromium, open_browser
from cage import Cases
from refinfer.cli.imported import imported
from refinfer.errors import RefinferError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.model.weights import RowMajorSource

GOLDEN = Path(__file__).parent / "golden"

# If these say that a build server runs the tests, pytest writes every comparison that fails out in full. For two
# packed buffers that takes minutes, and longer if a test looks for a provider's mistake again and again.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)

# Whoever runs the tests in the background of a script has them ignore Ctrl-C, and `nohup` the end of the terminal; so
# would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # Windows has no SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Property tests draw the same examples each time, and none is timed: a shared machine would make them flicker.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


@dataclass(frozen=True)
class Golden:
    """A tiny checkpoint and what `transformers` makes of it."""

    family: str
    folder: Path
    prompt: list[int]
    logits: list[list[float]]
    greedy: list[int]


def _load_golden(family: str) -> Golden:
    raw: dict[str, Any] = json.loads((GOLDEN / family / "golden.json").read_text())
    return Golden(family, GOLDEN / family, raw["prompt"], raw["logits"], raw["greedy"])


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium")
    with open_browser(program, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def no_terminal_in_the_environment() -> None:
    """Nothing says how wide a terminal is, whether it has colours or how output is buffered, also to programs.

    Python's readline sets the first two for programs only, past `os.environ`.
    """
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED"):
        os.environ.pop(name, None)
        os.unsetenv(name)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """The products of tests are small: several BLAS threads would only wait busily for one another."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory for this run alone, also for the programs it starts."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache-home")
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.delenv("REFINFER_CACHE_DIR", raising=False)
        yield home


@pytest.fixture(params=["llama", "llama3-rope", "llama-bias", "mistral", "qwen2", "qwen3"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each family in turn."""
    return _load_golden(request.param)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A small model with everything in it: grouped queries, biases, norms on queries and keys, an odd vocabulary."""
    return replace(
        SHAPES["tiny"],
        model_type="qwen3",
        vocab_size=261,
        hidden_size=40,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=96,
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def tiny_folder(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of `tiny_config`; not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder, tiny_config, dtype="f32", seed=3)
    return folder


@pytest.fixture
def tiny_source(tiny_config: ModelConfig, tiny_folder: Path) -> RowMajorSource:
    """The weights of `tiny_folder`."""
    return RowMajorSource(tiny_config, open_checkpoint(tiny_folder))


@pytest.fixture(scope="session")
def storyteller() -> Iterator[refinfer.Session]:
    """The model that ships with the package, loaded once."""
    with refinfer.load() as session:
        yield session


def pytest_collection_finish() -> None:
    """Tens of thousands of tests' objects live for ever: looking through them for garbage would take a tenth longer."""
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let anybody hold their own weight cache or weight source against the specification."""
    about = "run the tests of weight cache providers on this class instead; Class() must be an empty one"
    parser.addoption("--provider", metavar="PACKAGE:CLASS", help=about)
    about = (
        "run the tests of weight sources on this class instead, or on several; Class(config, folder) must be a source "
        "of the checkpoint in a folder; its attribute `rounding`, if any, says how wrong a weight may be, as a share "
        "of the largest of its row (default: 0), and its method `damage`, if any, changes a weight where it lies"
    )
    parser.addoption("--source", metavar="PACKAGE:CLASS", action="append", default=[], help=about)
    about = "how long each attack draws cases (default: 45)"
    parser.addoption("--attack-seconds", metavar="S", type=float, default=45.0, help=about)
    about = "largest number of cases of each attack (default: no limit)"
    parser.addoption("--attack-cases", metavar="N", type=int, help=about)
    about = "random seed of each attack's first case; the next ones count up (default: a different one each run)"
    parser.addoption("--attack-seed", metavar="N", type=int, help=about)


def pytest_configure(config: pytest.Config) -> None:
    """Say in one line if a class that somebody named cannot be imported, before any test is collected."""
    own: str | None = config.getoption("provider")
    for option, names in {"--provider": [own] if own else [], "--source": config.getoption("source")}.items():
        for name in names:
            try:
                imported(name)
            except RefinferError as error:
                raise pytest.UsageError(f"{option} {error}") from None


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Iterator[Cases]:
    """The cases of an attack, each a source of random numbers; a failure prints how to replay the last one."""
    seed, most = request.config.getoption("--attack-seed"), request.config.getoption("--attack-cases")
    first = SystemRandom().randrange(1 << 32) if seed is None else seed
    drawn = Cases(first, most, request.config.getoption("--attack-seconds"))
    yield drawn
    again = f"pytest -m attack '{request.node.nodeid}' --attack-seed {drawn.seed} --attack-cases 1"
    print(f"{drawn.n} cases; the last one again: {again}")  # noqa: T201


@cache
def clauses() -> dict[str, str]:
    """Return the sentence of each clause of the specification."""
    page = (Path(__file__).parents[1] / "docs" / "spec.md").read_text()
    return dict(re.findall(r"^- <a .+?</a>\*\*([A-Z]+-\d+)\*\* (.+?) \*Source: ", page, flags=re.MULTILINE))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """When a test fails, print the clauses it holds."""
    if call.excinfo is not None and (marks := [str(i) for m in item.iter_markers("spec") for i in m.args]):
        sentences = [f"{mark}: {clauses().get(mark, 'no such clause')}" for mark in marks]
        item.add_report_section(call.when, "specification", "\n".join(["this test holds", *sentences]))
