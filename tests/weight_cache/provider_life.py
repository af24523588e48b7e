"""A state machine that calls the verbs of a weight cache provider at random, next to a `dict` that does the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from provider_kinds import VERBS, VIEWS, A, Kind, key_of, never
from refinfer.arrays import PAGE_BYTES
from refinfer.errors import PackingError, WeightCacheStateError
from refinfer.packing.formats import layout_of
from refinfer.packing.layout import Bytes
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.packers import matrix_key, padded_nbytes_of, rows_key

KEYS = {
    **{f"{name}{n_pages}": key_of(name, n_pages) for n_pages in (1, 2) for name in "abc"},
    "rows": rows_key((3, 5), "f16", A.weights),
    "matrix": matrix_key(layout_of("f32", 17, 60), A.weights),
}
a_key = st.sampled_from(list(KEYS))
a_fill = st.integers(1, 3)  # few, so that buffers are often equal


class Life(RuleBasedStateMachine):
    """A provider from its beginning to its end, next to a `dict` that does the same."""

    kind: Kind

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.cache = self.kind.begin(Path(self.folder.name))
        self.state = "building"
        self.model: dict[PackKey, bytes] = {}
        self.offsets: dict[PackKey, int] = {}
        self.space: Bytes | None = None
        self.superseded: list[Bytes] = []  # space that was reserved before this one and never committed
        self.left: Bytes | None = None  # space that was never committed, once the building is over
        self.held: list[tuple[Bytes, bytes]] = []

    def supersede(self) -> None:
        """Another reservation takes the place of the present one."""
        if self.space is not None:
            self.superseded.append(self.space)
        self.space = None

    def commit(self, key: PackKey, buffer: Bytes, *, in_place: bool = False) -> None:
        """Insert a buffer that may be new, in any state but the last."""
        data = buffer.tobytes()
        if key not in self.model and self.state == "complete":
            with pytest.raises(WeightCacheStateError):
                self.cache.look_up_or_insert(key, buffer)
            return
        offset = self.cache.look_up_or_insert(key, buffer)
        if key in self.model:
            assert offset == self.offsets[key]
            return
        assert all(data == self.model[other] for other in self.model if offset == self.offsets[other])
        self.model[key], self.offsets[key] = data, offset
        if in_place:
            self.space = None
        else:
            self.supersede()

    @precondition(lambda self: self.state == "building")
    @rule(nbytes=st.integers(1, 4).map(lambda n: n * PAGE_BYTES) | st.integers(1, 3 * PAGE_BYTES))
    def reserve(self, nbytes: int) -> None:
        self.supersede()
        self.space = self.cache.reserve_space(nbytes)
        assert self.space.shape == (nbytes,)
        assert self.space.ctypes.data % PAGE_BYTES == 0
        assert not self.space.any()
        self.space[:] = 0xA5

    @precondition(lambda self: self.space is not None)
    @rule(name=a_key, fill=a_fill, view=st.sampled_from(list(VIEWS)))
    def commit_reserved(self, name: str, fill: int, view: str) -> None:
        nbytes = padded_nbytes_of(KEYS[name])
        if self.space is not None and self.space.size >= nbytes:
            self.space[:nbytes] = fill
            self.commit(KEYS[name], VIEWS[view](self.space[:nbytes]), in_place=True)

    @precondition(lambda self: self.space is not None)
    @rule(name=a_key, fill=a_fill, start=st.sampled_from([1, 5, PAGE_BYTES - 1, PAGE_BYTES, 2 * PAGE_BYTES]))
    def commit_what_lies_inside(self, name: str, fill: int, start: int) -> None:
        nbytes = padded_nbytes_of(KEYS[name])
        if self.space is not None and self.space.size >= start + nbytes:
            self.space[:] = 0xA5
            self.space[start : start + nbytes] = fill
            self.commit(KEYS[name], self.space[start : start + nbytes])

    @precondition(lambda self: self.superseded and self.state == "building")
    @rule(name=a_key, which=st.integers(0, 9), view=st.sampled_from(list(VIEWS)))
    def commit_superseded(self, name: str, which: int, view: str) -> None:
        nbytes, space = padded_nbytes_of(KEYS[name]), self.superseded[which % len(self.superseded)]
        if space.size >= nbytes:
            self.commit(KEYS[name], VIEWS[view](space[:nbytes]))

    @precondition(lambda self: self.left is not None)
    @rule(fill=a_fill)
    def write_to_what_was_never_committed(self, fill: int) -> None:
        if self.left is not None:
            self.left[:] = fill

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key, fill=a_fill)
    def commit_foreign(self, name: str, fill: int) -> None:
        buffer = np.full(padded_nbytes_of(KEYS[name]), fill, np.uint8)
        self.commit(KEYS[name], buffer)
        buffer[:] = 0

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key, committed=a_key)
    def commit_what_is_there(self, name: str, committed: str) -> None:
        if KEYS[committed] in self.model and padded_nbytes_of(KEYS[name]) == padded_nbytes_of(KEYS[committed]):
            self.commit(KEYS[name], self.cache[KEYS[committed]])

    @precondition(lambda self: self.state == "building")
    @rule(name=a_key, by=st.sampled_from([-PAGE_BYTES, -1, 1, PAGE_BYTES]), reserved=st.booleans())
    def commit_another_size(self, name: str, by: int, reserved: bool) -> None:
        nbytes = padded_nbytes_of(KEYS[name]) + by
        if KEYS[name] not in self.model and nbytes > 0:
            buffer = np.zeros(nbytes, np.uint8)
            if reserved:
                self.supersede()
                self.space = buffer = self.cache.reserve_space(nbytes)
            with pytest.raises(PackingError):
                self.cache.look_up_or_insert(KEYS[name], buffer)

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key, fill=a_fill, fails=st.booleans())
    def get_or_pack(self, name: str, fill: int, fails: bool) -> None:
        key = KEYS[name]
        if key in self.model:
            assert self.cache.get_or_pack(key, never).tobytes() == self.model[key]
            return

        def pack(buffer: Bytes) -> Iterator[int]:
            assert buffer.shape == (padded_nbytes_of(key),)
            assert not buffer.any()
            buffer[:] = fill
            yield 1
            if fails:
                raise PackingError("this cannot be packed")

        self.supersede()
        if fails:
            with pytest.raises(PackingError, match="this cannot be packed"):
                self.cache.get_or_pack(key, pack)
            return
        buffer = self.cache.get_or_pack(key, pack)
        assert buffer.tobytes() == bytes([fill]) * padded_nbytes_of(key)
        if self.state == "building":
            offset = self.cache.look_up(key)
            assert offset is not None
            self.model[key], self.offsets[key] = buffer.tobytes(), offset

    @precondition(lambda self: self.state != "deleted")
    @rule(offset=st.integers(-10, 20).map(lambda n: n * PAGE_BYTES // 2))
    def ask_for_an_offset(self, offset: int) -> None:
        if offset not in self.offsets.values():
            with pytest.raises(WeightCacheStateError):
                self.cache.offset_to_addr(offset)

    @precondition(lambda self: self.state != "deleted")
    @rule(name=a_key)
    def hold_a_view(self, name: str) -> None:
        if KEYS[name] in self.model:
            self.held.append((self.cache[KEYS[name]], self.model[KEYS[name]]))

    @precondition(lambda self: self.state == "complete")
    @rule()
    def reserve_once_complete(self) -> None:
        with pytest.raises(WeightCacheStateError):
            self.cache.reserve_space(PAGE_BYTES)

    @precondition(lambda self: self.state == "building" and len(self.model) > 2)
    @rule()
    def complete(self) -> None:
        self.cache = self.kind.complete(self.cache)
        self.state, self.left, self.space = "complete", self.space, None
        self.superseded = []
        self.offsets = {key: offset for key in self.model if (offset := self.cache.look_up(key)) is not None}

    @precondition(lambda self: self.state == "complete")
    @rule()
    def finalize_again(self) -> None:
        self.cache.finalize()

    @precondition(lambda self: len(self.model) > 3)
    @rule()
    def delete(self) -> None:
        self.cache.delete_cache()
        self.state, self.space = "deleted", None
        for call, name, states in VERBS.values():
            if "deleted" not in states:
                with pytest.raises(WeightCacheStateError, match=name):
                    call(self.cache, PAGE_BYTES)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        assert self.cache.is_finalized() == (self.state != "building")
        for view, data in self.held:
            assert view.tobytes() == data
        if self.state != "deleted":
            assert list(self.cache) == list(self.model)
            assert len(self.cache) == len(self.model)
            for key in KEYS.values():
                assert self.cache.look_up(key) == self.offsets.get(key)
                assert (key in self.cache) == (key in self.model)
            for key, data in self.model.items():
                view = self.cache.offset_to_addr(self.offsets[key])
                assert view.tobytes() == self.cache[key].tobytes() == data
                assert not view.flags.writeable

    def teardown(self) -> None:
        self.cache.delete_cache()
        for view, data in self.held:
            assert view.tobytes() == data
        self.folder.cleanup()


def live(kind: Kind, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)) -> None:
    """Let providers of a kind live many lives, and report in as few steps as possible what went wrong in one."""
    machine = type("Life", (Life,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=30, phases=phases))
