"""Sessions with a cache file, and ways to damage it: what the tests of the engine share."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refinfer.errors import BudgetError
from refinfer.generate import STORYTELLER, GenerationStats, Session, load
from refinfer.model.config import ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.load_or_build import CacheOutcome
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import record_nbytes

WATCHDOG_S = 10
NOBODY = 65534
PROMPT = [1, 2, 3, 4, 5]
POSITIONS = 24
BUFFERS = 24  # vectors, embedding table, seven matrices in each of three layers, output table

every_format = pytest.mark.parametrize("name", list(FORMATS))


def opened(folder: Path, cache: Path | str | None, **options: Any) -> Session:
    return load(folder, weight_cache=cache, max_positions=POSITIONS, threads=1, **options)


def stats_of(session: Session, max_tokens: int = 8) -> GenerationStats:
    list(session.generate(token_ids=PROMPT, max_tokens=max_tokens))
    assert session.stats is not None
    return session.stats


def tokens_of(session: Session, max_tokens: int = 8) -> tuple[int, ...]:
    return stats_of(session, max_tokens).token_ids


def start(folder: Path, cache: Path | str | None, **options: Any) -> tuple[tuple[int, ...], CacheOutcome]:
    """Load a model, generate a few tokens, close it; return the tokens, and what the cache did."""
    with opened(folder, cache, **options) as session:
        return tokens_of(session), session.weight_cache


def smallest_for(folder: Path, cache: Path | str | None, **options: Any) -> int:
    """Ask for the smallest budget as people do: by trying one that is too small."""
    with pytest.raises(BudgetError) as refused:
        opened(folder, cache, budget=1, **options)
    found = re.search(r"the smallest that works is (\d+) bytes", str(refused.value))
    assert found
    return int(found[1])


def entries_of(cache: Path) -> dict[tuple[str, str], Entry]:
    return {(entry.key.packer, entry.key.name): entry for entry in read_file(cache)[1].entries}


def flip(cache: Path, offset: int) -> None:
    """Change a bit of a byte, in place."""
    with cache.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def place_in(cache: Path, what: str) -> int:
    """Return where some part of a cache file lies."""
    entries = entries_of(cache)
    vectors = next(entry for (packer, _), entry in entries.items() if packer == "vectors")
    table = entries["rows", "model.embed_tokens.weight"]
    places = {
        "header": 20,
        "index": cache.stat().st_size - 1,
        "vectors": vectors.offset + 100,
        "first layer": entries["goi", "model.layers.0.self_attn.v_proj.weight"].offset,
        "last layer": entries["goi", "model.layers.2.mlp.down_proj.weight"].offset + 77,
        "output table": entries["goi", "lm_head.weight"].offset + 1234,
        "a row of the prompt": table.offset + record_nbytes(table.key) * PROMPT[2] + 3,
    }
    return places[what]


PARTS = ["header", "index", "vectors", "first layer", "last layer", "output table", "a row of the prompt"]
WEIGHTS = PARTS[2:]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as POSIX has it")


def in_a_child(work: Callable[[], Any], *, unprivileged: bool = False) -> Any:
    """Return what `work` returns in a process of its own, forked, where asked without rights; a watchdog ends it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, of BLAS, and the child starts none
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(WATCHDOG_S)
            os.close(reader)
            if unprivileged and os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            with os.fdopen(writer, "w") as answer:
                json.dump(work(), answer)
            status = 0
        except BaseException:  # noqa: BLE001, RUF100 -- the child must not return into pytest
            sys.stderr.write(traceback.format_exc())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"
    return json.loads(text)


def told_by(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what `work` returns, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    assert all(warning.category is RuntimeWarning for warning in caught)
    return result, [str(warning.message) for warning in caught]


# Fixtures: a module of tests that wants them takes them over by name.


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of a model with two tables, each of whose tokens is a letter; not to be written to."""
    folder = tmp_path_factory.mktemp("engine") / "model"
    write_checkpoint(folder, replace(tiny_config, vocab_size=65), dtype="f32", seed=3)
    shutil.copy(STORYTELLER / "tokenizer.json", folder)
    return folder


@pytest.fixture
def everyones(folder: Path) -> Iterator[Path]:
    """A folder that everyone may look into, with a model in it, and an empty folder `cache`."""
    with tempfile.TemporaryDirectory() as name:
        everyones = Path(name)
        everyones.chmod(0o755)
        model = Path(shutil.copytree(folder, everyones / "model"))
        (everyones / "cache").mkdir()
        for path in (model, *model.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield everyones


@pytest.fixture
def read_only(everyones: Path) -> Iterator[Path]:
    """The same, where the folder `cache` takes no new file."""
    (everyones / "cache").chmod(0o555)
    yield everyones
    (everyones / "cache").chmod(0o755)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[int, ...]:
    """The tokens, whatever they are computed with."""
    return start(folder, ":memory")[0]


@pytest.fixture
def built(folder: Path, tmp_path: Path) -> Path:
    """A cache file, built."""
    start(folder, tmp_path / "cache" / "weights")
    return tmp_path / "cache" / "weights"
