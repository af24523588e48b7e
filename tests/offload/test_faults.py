"""Specifies what happens when something goes wrong while weights stream: one clear error, no wait, nothing left.

Real files, real threads, real processes. Whatever may hang runs in a thread or a program that is given up after a
while, and every test must leave no thread and no descriptor more than it found. `tests/test_engine.py` has what happens
to damaged files from one start to the next, `test_prefetch.py` what threads may do to each other.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refinfer.arrays import PAGE_BYTES
from refinfer.cli.main import main
from refinfer.errors import DamagedWeightsError, GenerationError, RequestError
from refinfer.generate import STORYTELLER, Session, load
from refinfer.inventory import Inventory
from refinfer.model.config import ModelConfig
from refinfer.model.folder import open_folder
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.offload.streamed import StreamedSource
from refinfer.planning.account import fixed_of
from refinfer.planning.plan import smallest_budget
from refinfer.weight_cache.identity import side_path

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import WATCHDOG_S, PackedModel, change, threads_and_descriptors, within

POSITIONS: Final = 24
PROMPT: Final = [1, 2, 3, 4, 5]
MOST: Final = 4  # tokens

every_number_of_threads = pytest.mark.parametrize("threads", [0, 1, 2])


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = threads_and_descriptors()
    yield
    if threads_and_descriptors() - before:
        gc.collect()  # slow
    assert not threads_and_descriptors() - before


# A file that changes while it streams.


class Streaming(PackedModel):
    """A model in a cache file that is put back after each accident; nothing of it is locked."""

    @cached_property
    def content(self) -> bytes:
        return self.built.read_bytes()

    @cached_property
    def weights(self) -> list[tuple[int, int, int]]:
        """Where chunks lie that every token needs: first byte, end of the weights, end of the pages."""
        return [(c.offset, c.offset + c.nbytes, c.offset + c.padded_nbytes) for c in self.chunks]

    def put_back(self) -> None:
        if self.file.exists() and self.file.stat().st_size == len(self.content):
            with self.file.open("r+b") as file:
                file.write(self.content)
        else:
            self.file.unlink(missing_ok=True)
            self.file.write_bytes(self.content)

    def source(self, threads: int) -> StreamedSource:
        budget = self.smallest + 8 * int(self.inventory.sizes.max())
        return self.streamed(self.plan("none", budget, prefetch_threads=threads))

    @cached_property
    def expected(self) -> npt.NDArray[np.uint32]:
        source = self.source(0)
        try:
            return Transformer(source, POSITIONS).decode([7]).view(np.uint32)
        finally:
            source.close()

    def tokens(self, threads: int, accident: Callable[[], None]) -> list[str]:
        """Say of each of some tokens, the first of them before an accident, whether it is right or what was raised."""
        source, told = self.source(threads), []
        try:
            transformer = Transformer(source, POSITIONS)
            for n in range(4):
                if n == 1:
                    accident()
                told.append(self.token(transformer))
        finally:
            within(source.close)
        return told

    def token(self, transformer: Transformer) -> str:
        transformer.kv_cache.rewind(0)
        try:
            logits = within(lambda: transformer.decode([7]))
        except DamagedWeightsError as error:
            return str(error)
        return "right" if np.array_equal(logits.view(np.uint32), self.expected) else "wrong"


@pytest.fixture(scope="module")
def streaming(tiny_folder: Path, tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Streaming:
    file = tmp_path_factory.mktemp("faults") / "cache"
    streaming = Streaming(tiny_config, tiny_folder, "int8", file, POSITIONS)
    assert streaming.content
    assert len(streaming.weights) > 40
    assert streaming.expected.size
    return streaming


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


places = st.floats(0, 1, exclude_max=True)


@pytest.mark.spec("FETCH-9", "OFFLOAD-9", "STORE-3")
@settings(max_examples=10)
@given(place=places, threads=st.integers(0, 3))
@example(place=0.0, threads=2)
def test_a_file_cut_anywhere_while_it_streams_is_one_error_or_changes_nothing(
    place: float, threads: int, streaming: Streaming
) -> None:
    size = int(place * len(streaming.content))
    first, *told = streaming.tokens(threads, lambda: cut(streaming.file, size))
    streaming.put_back()
    assert first == "right"
    assert set(told) <= {"right", f"{streaming.file} was cut short while it was in use; start again"}
    assert told == sorted(told, key=lambda text: text != "right")  # once it has been found, there are no more tokens
    if size < max(end for _, end, _ in streaming.weights):
        assert told[-1] != "right"
    if size >= max(padded for _, _, padded in streaming.weights):
        assert told == ["right"] * 3


@pytest.mark.spec("FETCH-9", "OFFLOAD-9")
@settings(max_examples=10)
@given(place=places, threads=st.integers(0, 3))
def test_a_byte_changed_anywhere_while_it_streams_is_one_error_or_changes_nothing(
    place: float, threads: int, streaming: Streaming
) -> None:
    at = int(place * len(streaming.content))
    first, *told = streaming.tokens(threads, lambda: change(streaming.file, at))
    streaming.put_back()
    assert first == "right"
    assert "wrong" not in told
    assert told == sorted(told, key=lambda text: text != "right")
    if any(start <= at < end for start, end, _ in streaming.weights):
        assert re.search(r"chunk \d+, does not agree with its checksum: the file is damaged; start again$", told[-1])
    elif "model.embed_tokens" not in told[-1]:
        assert told == ["right"] * 3


@pytest.mark.spec("FETCH-9", "OFFLOAD-9")
@every_number_of_threads
def test_the_weights_of_another_model_written_over_them_are_found_before_a_token_is_made_of_them(
    threads: int, streaming: Streaming, tmp_path: Path
) -> None:
    """Those of a good cache file of a model of the same shapes, in the place of the file in use."""
    write_checkpoint(tmp_path / "m", streaming.config, dtype="f32", seed=4)
    other = replace(streaming, folder=tmp_path / "m", file=tmp_path / "cache")
    assert other.content
    assert other.weights == streaming.weights

    def accident() -> None:
        with streaming.file.open("r+b") as file:
            file.write(other.content)

    told = streaming.tokens(threads, accident)
    streaming.put_back()
    assert "wrong" not in told
    assert "does not agree with its checksum" in told[-1]


@pytest.mark.spec("FETCH-9", "OFFLOAD-9", "PUBLISH-5")
@every_number_of_threads
def test_a_file_that_is_replaced_removed_or_closed_to_others_while_it_streams_changes_nothing(
    threads: int, streaming: Streaming
) -> None:
    def accident() -> None:
        streaming.file.chmod(0)
        streaming.file.with_name("other").write_bytes(bytes(PAGE_BYTES))
        streaming.file.with_name("other").replace(streaming.file)
        streaming.file.unlink()

    told = streaming.tokens(threads, accident)
    streaming.put_back()
    assert told == ["right"] * 4


class Reads:
    """Lets one of the reads of a file go wrong, and all after it, or only that one."""

    def __init__(self, at: int, how: str) -> None:
        self.count = 0
        self.at, self.how = at, how
        self._lock, self._real = threading.Lock(), os.preadv

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number < self.at:
            return self._real(descriptor, buffers, offset)
        if self.how == "fails":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.how == "fails once" and number == self.at:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if self.how == "ends":
            return 0
        if self.how == "brings other bytes" and number == self.at:
            n = self._real(descriptor, buffers, offset)
            np.frombuffer(buffers[0], np.uint8)[:] ^= 0x55  # every byte: of a row's pages most are not its own
            return n
        return self._real(descriptor, [buffers[0][:PAGE_BYTES]] if self.how == "is short" else buffers, offset)


SAID: Final = {
    "fails": "cannot be read: Input/output error; if that lasts, remove it with refinfer cache rm",
    "fails once": "cannot be read: Connection timed out; if that lasts, remove it with refinfer cache rm",
    "ends": "was cut short while it was in use; start again",
    "brings other bytes": "does not agree with its checksum: the file is damaged; start again",
}


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv, as POSIX has it")
@pytest.mark.spec("FETCH-9", "FETCH-6", "OFFLOAD-9", "STORE-3")
@settings(max_examples=24)
@given(at=st.integers(0, 100), how=st.sampled_from([*SAID, "is short"]), threads=st.integers(0, 3))
@example(at=0, how="ends", threads=1)  # the first of all: that of the norms
@example(at=1, how="brings other bytes", threads=1)
@example(at=1, how="brings other bytes", threads=0)  # the row of the token
def test_a_read_that_goes_wrong_is_one_error_whichever_it_is_and_a_short_read_changes_nothing(
    at: int, how: str, threads: int, streaming: Streaming
) -> None:
    """Three tokens take more than a hundred reads, not counting what is read ahead for a fourth."""
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        source: list[StreamedSource] = []
        reads = Reads(at + 1, how)  # after the one that tries whether there is direct I/O
        patch.setattr(os, "preadv", reads)
        try:
            source.append(within(lambda: streaming.source(threads)))
            transformer = Transformer(source[0], POSITIONS)
            told.extend(streaming.token(transformer) for _ in range(3))
        except (DamagedWeightsError, GenerationError) as error:
            told.append(str(error))
        finally:
            for each in source:
                within(each.close)
    wrong = [text for text in told if text != "right"]
    if how == "is short":
        assert not wrong
    else:
        assert wrong
        assert all(text.startswith(str(streaming.file)) and text.endswith(SAID[how]) for text in wrong)


# Sessions.


@dataclass(frozen=True)
class Site:
    """A model with a tokenizer, whose every token is a letter, and the place of its cache file."""

    folder: Path
    cache: Path

    def load(self, threads: int, **options: Any) -> Session:
        config = open_folder(self.folder).config
        inventory = Inventory(config, "int8")
        budget = smallest_budget(inventory, fixed_of(inventory, POSITIONS, threads)) + 8 * int(inventory.sizes.max())
        given: dict[str, Any] = {"budget": budget, "plan": "none", "prefetch_threads": threads}
        return load(
            self.folder, weights="int8", weight_cache=self.cache, max_positions=POSITIONS, threads=1, **given | options
        )


@pytest.fixture(scope="module")
def site(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("session") / "m"
    write_checkpoint(folder, replace(tiny_config, vocab_size=65), dtype="f32", seed=3)
    shutil.copy(STORYTELLER / "tokenizer.json", folder)
    site = Site(folder, folder.parent / "cache")
    site.load(0).close()
    return site


def text_of(session: Session) -> str:
    return "".join(session.generate(token_ids=PROMPT, max_tokens=MOST))


@pytest.fixture(scope="module")
def text(site: Site) -> str:
    with site.load(0, budget=None) as session:
        return text_of(session)


@pytest.mark.spec("GEN-9", "FETCH-5")
@every_number_of_threads
def test_a_later_generation_ends_an_earlier_one_also_while_chunks_stream(threads: int, site: Site, text: str) -> None:
    with site.load(threads) as session:
        first = session.generate(token_ids=PROMPT, max_tokens=MOST)
        assert "".join(next(first) for _ in range(2)) == text[:2]
        second = session.generate(token_ids=PROMPT, max_tokens=MOST)
        start = within(lambda: next(second))
        with pytest.raises(RequestError, match="ended by a later one"):
            within(lambda: next(first))
        assert start + within(lambda: "".join(second)) == text


@pytest.mark.spec("GEN-4", "OFFLOAD-8")
@every_number_of_threads
def test_a_request_longer_than_the_reserved_positions_is_refused_before_anything_is_read(
    threads: int, site: Site, text: str
) -> None:
    with site.load(threads) as session:
        reads = Reads(10**9, "fails")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", reads)
            for ids, n in ((PROMPT, POSITIONS - len(PROMPT) + 1), (list(range(POSITIONS)), 1)):
                with pytest.raises(RequestError, match=f"do not fit the {POSITIONS} positions reserved"):
                    session.generate(token_ids=ids, max_tokens=n)
            with pytest.raises(RequestError, match="do not fit"):
                Transformer(session.source, POSITIONS).decode(list(range(POSITIONS + 1)))
        assert reads.count <= 8  # what the threads had not yet read ahead
        assert session.stats is None
        assert text_of(session) == text
        assert len(list(session.generate(token_ids=list(range(POSITIONS - 1)), max_tokens=1))) == 1


@pytest.mark.spec("GEN-15", "PLAN-3", "ERR-2")
def test_a_budget_below_the_smallest_is_one_line_that_names_one_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "HAMLET:", "--max-tokens", "2", "--weight-cache", str(tmp_path / "cache"), "--budget"]
    assert main([*argv, "1kB"]) == 2
    said = capsys.readouterr()
    smallest = re.fullmatch(r"refinfer: .*; the smallest that works is (\d+) bytes \(.*\)\n", said.err)
    assert smallest, said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []
    assert main([*argv, str(int(smallest[1]) - 1)]) == 2
    assert main([*argv, smallest[1]]) == 0


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv, as POSIX has it")
@pytest.mark.spec("FETCH-7", "STORE-6", "GEN-8")
@pytest.mark.parametrize(("threads", "at"), [(0, 0), (0, 3), (0, 40), (1, 0), (2, 0)])
def test_closing_during_a_read_of_whoever_computes_waits_for_nobody_and_suspects_no_file(
    threads: int, at: int, site: Site, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with prefetch threads, the computation itself reads the row of an embedding table."""
    reading, go, real, count = threading.Event(), threading.Event(), os.preadv, [0]

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if threading.current_thread() is telling:
            count[0] += 1
            if count[0] == at + 1:
                reading.set()
                assert go.wait(WATCHDOG_S)
        return real(descriptor, buffers, offset)

    said: list[BaseException | str] = []

    def tell() -> None:
        try:
            said.append(text_of(session))
        except BaseException as error:
            said.append(error)

    session = site.load(threads)
    telling = threading.Thread(target=tell, daemon=True)
    monkeypatch.setattr(os, "preadv", preadv)
    telling.start()
    try:
        assert reading.wait(WATCHDOG_S)
        within(session.close)
        within(session.close)
    finally:
        go.set()
        telling.join(WATCHDOG_S)
    assert not telling.is_alive()
    assert type(said[0]) is GenerationError
    assert "closed" in str(said[0])
    said.clear()
    with site.load(threads) as session:
        assert session.weight_cache.state == "loaded"
        assert text_of(session) == text


# Programs that are ended.


RATE: Final = 20_000
"""Bytes per second: the first two chunks of the storyteller in f32 take ten seconds."""


@pytest.fixture(scope="module")
def told_before(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The storyteller, whose cache file is there."""
    cache = tmp_path_factory.mktemp("told") / "weights"
    load(weights="f32", weight_cache=cache).close()
    return Site(STORYTELLER, cache)


def telling(cache: Path, threads: int, **more: str) -> list[str]:
    """Return the command of a program that tells a story within a budget; by default it locks nothing."""
    options = {"budget": "60%", "plan": "none", "prefetch_threads": str(threads), "weight_cache": str(cache)}
    options |= {"weights": "f32", "max_tokens": "100"} | more
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [sys.executable, "-m", "refinfer", "generate", "HAMLET:", "--temperature", "0", *words]


def begun(command: list[str]) -> subprocess.Popen[str]:
    """Start a program that has no BLAS thread and whose output can be read at once."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_until_it_waits(program: subprocess.Popen[str], threads: int) -> None:
    """Wait until a program has this number of threads besides its first one, and that one sleeps at many looks."""
    process, before, looks = Path(f"/proc/{program.pid}"), "", 0
    while program.poll() is None and sum(1 for _ in (process / "task").iterdir()) <= threads:
        threading.Event().wait(0.005)
    while program.poll() is None and looks < 300:
        status = (process / "status").read_text()
        looks = looks + 1 if status == before and "State:\tS" in status else 0
        before = status


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-11", "CLI-5", "FETCH-8")
@pytest.mark.parametrize(("plan", "told"), [("none", "HAMLET:"), ("balanced", "")])
def test_ctrl_c_while_a_slow_disk_is_waited_for_ends_the_program_at_once(
    plan: str, told: str, told_before: Site
) -> None:
    """While it waits for the first chunk of the prompt, and while it waits for locked chunks, before any output."""
    with begun(telling(told_before.cache, 2, plan=plan, disk_bandwidth=str(RATE))) as program:
        watchdog = threading.Timer(2 * WATCHDOG_S, program.kill)
        watchdog.start()
        try:
            assert program.stdout is not None
            assert program.stdout.read(len(told)) == told
            wait_until_it_waits(program, 2)
            program.send_signal(signal.SIGINT)
            said = program.communicate(timeout=8)
        finally:
            program.kill()
            watchdog.cancel()
            watchdog.join()
    assert said == ("", "refinfer: interrupted\n")
    assert program.returncode == 130


@pytest.mark.slow
@pytest.mark.spec("FETCH-10", "GEN-12")
def test_a_program_killed_while_it_generates_leaves_nothing_that_hinders_the_next(told_before: Site) -> None:
    """Killed before the first letter, since it is so slow; quicker, before the last."""
    cache = told_before.cache
    before = {path.name: path.read_bytes() for path in cache.parent.iterdir()}
    assert set(before) == {cache.name, side_path(cache).name}
    for letters, rate in ((0, str(RATE)), (3, "60MB")):
        with begun(telling(cache, 2, disk_bandwidth=rate)) as program:
            watchdog = threading.Timer(WATCHDOG_S, program.kill)
            watchdog.start()
            assert program.stdout is not None
            told = program.stdout.read(7 + letters)
            program.kill()
            program.communicate()
            watchdog.cancel()
            watchdog.join()
        assert program.returncode == -signal.SIGKILL
        assert {path.name: path.read_bytes() for path in cache.parent.iterdir()} == before
    command = [*telling(cache, 2, max_tokens="4"), "--json"]
    again = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=WATCHDOG_S).stdout)
    assert again["weight_cache"]["state"] == "loaded"
    assert again["text"].startswith(told.removeprefix("HAMLET:"))
