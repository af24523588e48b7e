"""Specifies prefetching in whole sessions: real files, real threads, many small chunks.

Passes that are left change nothing in the next, views are made once, and nothing is left of a session however it ends.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from refinfer.errors import DamagedWeightsError, GenerationError, RefinferError
from refinfer.generate import Session, load
from refinfer.inventory import Inventory
from refinfer.model.config import ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.readers import Loan
from refinfer.offload.store import FileStore
from refinfer.offload.streamed import StreamedSource
from refinfer.packing import int8
from refinfer.packing.layout import Bytes, Chunk, PackedLayout, Tiles
from refinfer.planning.account import fixed_of
from refinfer.planning.plan import smallest_budget

sys.path.insert(0, str(Path(__file__).parent))
from packed_model import WATCHDOG_S, threads_and_descriptors, within

POSITIONS: Final = 64
PROMPT: Final = np.random.default_rng(5).integers(0, 261, 40).tolist()


@dataclass(frozen=True)
class Model:
    """A tiny model in a format, and a budget that makes most of it stream."""

    folder: Path
    config: ModelConfig
    name: str
    cache: str

    @property
    def inventory(self) -> Inventory:
        return Inventory(self.config, self.name)

    def budget(self, slots: int = 8, share: float = 0.1, positions: int = POSITIONS, threads: int = 1) -> int:
        """Return a budget for a ring of `slots`, a share of the weights as locks, and everything that is fixed."""
        inventory = self.inventory
        smallest = smallest_budget(inventory, fixed_of(inventory, positions, threads))
        return smallest + slots * int(inventory.sizes.max()) + int(share * inventory.streamable_nbytes)

    def ring(self, slots: int) -> int:
        return slots * int(self.inventory.sizes.max())

    def load(self, **options: Any) -> Session:
        given: dict[str, Any] = {
            "budget": self.budget(threads=options.get("prefetch_threads", 1)),
            "plan": "balanced",
            "prefetch_threads": 1,
            "weight_cache": self.cache,
        }
        return load(self.folder, weights=self.name, max_positions=POSITIONS, threads=1, **given | options)


@pytest.fixture(scope="module")
def written(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A checkpoint of ten layers."""
    folder = tmp_path_factory.mktemp("prefetch") / "m"
    config = replace(tiny_config, num_hidden_layers=10)
    write_checkpoint(folder, config, dtype="f32", seed=3)
    return folder, config


@pytest.fixture
def one(written: tuple[Path, ModelConfig], tmp_path: Path) -> Model:
    model = Model(*written, int8.name, str(tmp_path / "cache"))
    assert len(model.inventory.cycle) == 7 * 10 + 1
    return model


def bits(session: Session, ids: Sequence[int] = PROMPT) -> npt.NDArray[np.uint32]:
    return session.logits(ids).view(np.uint32)


def told(session: Session) -> tuple[int, ...]:
    for _ in session.generate(token_ids=PROMPT, max_tokens=5):
        pass
    assert session.stats is not None
    return session.stats.token_ids


# Passes that are left.


@pytest.mark.spec("FETCH-5", "FETCH-1")
def test_generations_that_are_left_in_the_middle_do_not_change_what_comes_next(one: Model) -> None:
    with one.load(budget=None, weight_cache=":memory") as session:
        expected, text = bits(session), told(session)
    with one.load(prefetch_threads=2) as session:
        for tokens in range(3):
            pieces = session.generate(token_ids=PROMPT, max_tokens=5)
            for _ in range(tokens):
                next(pieces)
            np.testing.assert_array_equal(bits(session), expected, strict=True)
            pieces.close()  # type: ignore[attr-defined]
            assert told(session) == text


def multiplying_fails(patch: pytest.MonkeyPatch, at: int) -> None:
    """Let the product with chunk number `at`, counted from 1, fail once."""
    real, count = int8.multiply, [0]

    def multiply(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise ValueError("a product fails")
        real(*arguments)

    patch.setattr(int8, "multiply", multiply)


@pytest.mark.spec("FETCH-5", "FETCH-8")
def test_a_pass_that_fails_while_a_chunk_is_held_does_not_change_the_next(
    one: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one.load(budget=None, weight_cache=":memory") as session:
        expected = bits(session)
    for at in (1, 2, 30, 61):
        with one.load(prefetch_threads=2) as session, monkeypatch.context() as patch:
            multiplying_fails(patch, at)
            with pytest.raises(ValueError, match="a product fails"):
                session.logits(PROMPT)
            np.testing.assert_array_equal(within(lambda s=session: bits(s)), expected, strict=True)  # type: ignore[misc]


def streamed(session: Session) -> tuple[StreamedSource, Prefetcher]:
    source = session.source
    assert isinstance(source, StreamedSource)
    assert isinstance(source._reader, Prefetcher)
    return source, source._reader


@pytest.mark.spec("FETCH-2", "OFFLOAD-10")
@pytest.mark.parametrize("at", [1, 2, 30])
def test_the_traceback_of_a_failed_pass_may_go_while_the_next_pass_uses_the_same_slot(
    one: Model, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when `sys.last_exc` is replaced, or cycles are collected: the generator that lent a chunk ends late."""
    with one.load(plan="none", prefetch_ring=one.ring(2)) as session:
        source, reader = streamed(session)
        multiplying_fails(monkeypatch, at)
        with pytest.raises(ValueError, match="a product fails") as failed:
            session.logits(PROMPT)
        old = reader._taken
        assert old is not None
        now = source.chunks(at - 1, 3)
        assert next(now) is old.tiles  # in the same slot
        before = reader._released
        del failed
        gc.collect()
        assert reader._released == before
        assert reader._taken is not old
        next(now)
        assert reader._released == before + 1


@pytest.mark.spec("FETCH-2", "OFFLOAD-10")
def test_a_pass_that_ends_late_releases_nothing_of_the_one_that_goes_on(one: Model) -> None:
    with one.load(plan="none", prefetch_ring=one.ring(2)) as session:
        source, reader = streamed(session)
        late = source.chunks(0, 3)
        lent = next(late)
        now = source.chunks(0, 3)
        assert next(now) is lent
        before = reader._released
        late.close()  # type: ignore[attr-defined]
        assert reader._released == before
        next(now)
        assert reader._released == before + 1


# Views.


@pytest.mark.spec("READ-3")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "options", [{"prefetch_threads": 2}, {"prefetch_threads": 0}, {"prefetch_threads": 2, "paged": True}], ids=str
)
def test_typed_views_are_made_once_for_each_locked_chunk_and_for_each_slot_and_kind_of_chunk(
    one: Model, weights: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(one, name=weights)
    model.load().close()
    made: Counter[tuple[int, int, int, int]] = Counter()
    read: list[int] = []
    real_tiles, real_read = PackedLayout.tiles, FileStore.read

    def tiles(layout: PackedLayout, buffer: Bytes, chunk: Chunk) -> Tiles:
        made[buffer.ctypes.data, layout.tile.nr, layout.K, chunk.nbytes] += 1
        return real_tiles(layout, buffer, chunk)

    def reading(store: FileStore, offset: int, into: Bytes) -> None:
        read.append(offset)
        real_read(store, offset, into)

    monkeypatch.setattr(PackedLayout, "tiles", tiles)
    monkeypatch.setattr(FileStore, "read", reading)
    with model.load(**options) as session:
        source = session.source
        assert isinstance(source, StreamedSource)
        assert made.total() >= len(source.locked)  # threads may have begun to read ahead
        assert bool(source.locked) != ("paged" in options)
        for _ in range(3):
            told(session)
    assert set(made.values()) == {1}
    assert len(read) > 5 * made.total()


# Nothing is left.


class Gate:
    """Calls `before` with a number at each read of a prefetch thread."""

    def __init__(self, patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
        self.count = 0
        self._lock = threading.Lock()
        real = FileStore.read

        def read(store: FileStore, offset: int, into: Bytes) -> None:
            if threading.current_thread().name.startswith("prefetch-"):
                with self._lock:
                    number, self.count = self.count, self.count + 1
                before(number)
            real(store, offset, into)

        patch.setattr(FileStore, "read", read)


def prefetching() -> int:
    return sum(thread.name.startswith("prefetch-") for thread in threading.enumerate())


def assert_nothing_is_left(before: Counter[str]) -> None:
    if threads_and_descriptors() - before:
        gc.collect()  # slow
    assert not threads_and_descriptors() - before


def ends_normally(session: Session) -> None:
    told(session)


def ends_by_an_exception(session: Session) -> None:
    for _ in session.generate(token_ids=PROMPT, max_tokens=5):
        raise ZeroDivisionError


def ends_before_it_began(session: Session) -> None:
    session.generate(token_ids=PROMPT)


def ends_in_the_middle(session: Session) -> None:
    pieces = session.generate(token_ids=PROMPT, max_tokens=5)
    next(pieces)
    session.close()
    session.close()
    with pytest.raises(RefinferError):
        next(pieces)


def ends_by_a_product_that_fails(session: Session) -> None:
    with pytest.MonkeyPatch.context() as patch:
        multiplying_fails(patch, 40)
        told(session)


def ends_by_an_interrupted_take(session: Session) -> None:
    real, count = Prefetcher.take, [0]

    def take(prefetcher: Prefetcher, chunk: int) -> Loan:
        count[0] += 1
        if count[0] == 70:
            raise KeyboardInterrupt
        return real(prefetcher, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetcher, "take", take)
        told(session)


def ends_by_damage(session: Session) -> None:
    """Damage found before the first token is mended, by a second source with threads and a descriptor of its own."""
    with pytest.MonkeyPatch.context() as patch:
        failed: list[int] = []

        def fail(number: int) -> None:
            if not failed and number > 20:
                failed.append(number)
                raise DamagedWeightsError("damaged")

        Gate(patch, fail)
        told(session)
        assert failed


ENDS = {
    end.__name__: end
    for end in (
        ends_normally,
        ends_by_an_exception,
        ends_before_it_began,
        ends_in_the_middle,
        ends_by_a_product_that_fails,
        ends_by_an_interrupted_take,
        ends_by_damage,
    )
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8")
@pytest.mark.parametrize(
    ("end", "threads"),
    [(end, n) for end in ENDS for n in (0, 1, 3) if n or end not in ("ends_by_an_interrupted_take", "ends_by_damage")],
)
def test_no_thread_and_no_descriptor_is_left_after_a_session(one: Model, end: str, threads: int) -> None:
    one.load().close()
    before = threads_and_descriptors()
    expected = {
        "ends_by_an_exception": ZeroDivisionError,
        "ends_by_a_product_that_fails": ValueError,
        "ends_by_an_interrupted_take": KeyboardInterrupt,
    }
    with one.load(prefetch_threads=threads) as session:
        assert prefetching() == threads
        if end in expected:
            with pytest.raises(expected[end]):
                ENDS[end](session)
        else:
            within(lambda: ENDS[end](session))
    assert_nothing_is_left(before)
    session.close()
    assert_nothing_is_left(before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8", "FETCH-7")
@pytest.mark.parametrize("threads", [1, 3])
def test_closing_a_session_while_it_waits_for_a_chunk_leaves_nothing(
    one: Model, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.load().close()
    before = threads_and_descriptors()
    waits, begun, go = threading.Event(), threading.Event(), threading.Event()

    real_wait = threading.Condition.wait

    def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "telling" and stuck.count >= 30:
            waits.set()
        return real_wait(condition, timeout)

    def stop(number: int) -> None:
        if number >= 30:
            begun.set()
            assert go.wait(WATCHDOG_S)

    stuck = Gate(monkeypatch, stop)
    monkeypatch.setattr(threading.Condition, "wait", wait)
    errors: list[BaseException] = []

    def tell() -> None:
        try:
            told(session)
        except BaseException as error:
            errors.append(error)

    session = one.load(prefetch_threads=threads, plan="none")
    telling = threading.Thread(target=tell, name="telling", daemon=True)
    closing = threading.Thread(target=session.close, daemon=True)
    telling.start()
    try:
        assert waits.wait(WATCHDOG_S)
        assert begun.wait(WATCHDOG_S)
        closing.start()
        telling.join(WATCHDOG_S)  # while the reads go on
        assert not telling.is_alive()
        assert closing.is_alive()
    finally:
        go.set()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    assert [type(error) for error in errors] == [GenerationError]
    errors.clear()
    assert_nothing_is_left(before)
    assert Path(one.cache).exists()  # nothing was wrong with it


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8")
def test_a_session_that_could_not_be_opened_leaves_nothing(one: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    one.load().close()
    before, source = threads_and_descriptors(), StreamedSource.__init__
    made: list[StreamedSource] = []

    def making(self: StreamedSource, *arguments: Any, **options: Any) -> None:
        made.append(self)
        source(self, *arguments, **options)

    monkeypatch.setattr(StreamedSource, "__init__", making)
    monkeypatch.setattr("refinfer.engine.Transformer", fails)
    with pytest.raises(MemoryError):
        one.load(prefetch_threads=2)
    try:
        assert_nothing_is_left(before)
    finally:
        for each in made:
            each.close()


INTERRUPTED = """
import os, sys, threading
from refinfer.__main__ import main
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.store import FileStore

ready, stuck, go, n = int(sys.argv.pop(1)), int(sys.argv.pop(1)), threading.Event(), [0]
lock = threading.Lock()
real_read, real_close, real_wait = FileStore.read, Prefetcher.close, threading.Condition.wait


def read(*arguments):
    if threading.current_thread().name.startswith("prefetch-"):
        with lock:
            n[0] += 1
            stops = n[0] > stuck
        if stops:
            os.write(ready, b"r")
            go.wait()
    real_read(*arguments)


def close(*arguments):
    go.set()
    real_close(*arguments)


def wait(condition, timeout=None):
    if threading.current_thread() is threading.main_thread() and n[0] >= stuck:
        os.write(ready, b"m")
    return real_wait(condition, timeout)


FileStore.read, Prefetcher.close, threading.Condition.wait = read, close, wait
sys.exit(main())
"""


def ready_for_it(seen: bytes) -> bool:
    """Return whether both reads stop, and the take is about to wait."""
    return seen.count(b"r") == 2 and b"m" in seen


def wait_until_it_rests(program: subprocess.Popen[str]) -> None:
    """Wait until a program's first thread has slept for many looks at it.

    Python notices a signal that comes while it begins to wait for a lock only when that wait ends, or leaves the lock
    in disorder: that is not tested here.
    """
    before, looks = "", 0
    while looks < 300 and program.poll() is None:
        status = Path(f"/proc/{program.pid}/status").read_text()
        looks = looks + 1 if status == before and "State:\tS" in status else 0
        before = status


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, as Linux has it")
@pytest.mark.spec("FETCH-8", "FETCH-7")
@pytest.mark.parametrize("stuck", [0, 25], ids=["first chunk", "later chunk"])
def test_an_interrupt_while_a_chunk_is_waited_for_ends_the_program_in_one_line(one: Model, stuck: int) -> None:
    budget = one.budget(0, 0.0, threads=2)
    ready, theirs = os.pipe()
    argv = ["generate", "--model", str(one.folder), "--budget", str(budget), "--plan", "none", "--token-ids", "1,2,3"]
    argv += ["--max-tokens", "61", "--weight-cache", one.cache, "--prefetch-threads", "2", "--weights", "int8"]
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(theirs), str(stuck), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[theirs],
    ) as program:
        os.close(theirs)
        watchdog = threading.Timer(WATCHDOG_S, program.kill)
        watchdog.start()
        try:
            seen = b""
            while not ready_for_it(seen) and (some := os.read(ready, 1)):
                seen += some
            wait_until_it_rests(program)
            program.send_signal(signal.SIGINT)
            _, complaint = program.communicate()
        finally:
            watchdog.cancel()
            watchdog.join()
            os.close(ready)
    assert ready_for_it(seen), complaint
    assert program.returncode == 130
    assert complaint == "refinfer: interrupted\n"
