"""The bench of sharing. Speed itself is never judged."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from refinfer.bench import share
from refinfer.bench.start import GIGABYTE
from refinfer.errors import GenerationError
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint


@pytest.mark.slow
@pytest.mark.spec("BENCH-10")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports proportional set sizes")
def test_bench_share_measures_processes_that_live_at_once() -> None:
    config = replace(SHAPES["tiny"], vocab_size=40_000)  # ten megabytes in float32
    rows = list(share.share_rows(config))
    assert [(r["format"], r["mapped"], r["processes"]) for r in rows] == [
        (name, mapped, n) for name in ("f32", "bf16") for mapped in (True, False) for n in (1, 2, 4)
    ]
    pss = {(r["format"], r["mapped"], r["processes"]): r["pss_bytes"] for r in rows}
    shared, own = pss["f32", True, 4], pss["f32", False, 4]
    assert own - shared > 5_000_000  # three quarters of ten megabytes, and some


@pytest.mark.spec("BENCH-10")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports proportional set sizes")
def test_processes_that_are_measured_at_once_have_the_model_loaded_and_end_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"])
    measured: list[int] = []
    really = share._pss

    def pss(pid: int) -> int:
        measured.append(pid)
        assert all(Path(f"/proc/{other}").exists() for other in measured)
        return really(pid)

    monkeypatch.setattr(share, "_pss", pss)
    sizes = share._pss_of(2, [str(tmp_path / "m"), "f32", str(tmp_path / "w")])
    assert len(set(measured)) == len(sizes) == 2
    assert all(10_000_000 < nbytes < 1_000_000_000 for nbytes in sizes)
    assert (tmp_path / "w").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in measured)
    with pytest.raises(GenerationError, match="a process of bench share failed"):
        share._pss_of(1, [str(tmp_path / "nothing"), "f32", str(tmp_path / "w")])


@pytest.mark.spec("BENCH-10")
def test_a_process_keeps_the_model_that_it_has_used_until_the_bench_has_measured_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the model and for both ends of the pipes: what happens one after another."""
    happened: list[str] = []

    class Session:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            happened.append("closed")

        def generate(self, token_ids: list[int], max_tokens: int) -> list[str]:
            happened.append(f"generated {max_tokens}")
            return ["a"] * max_tokens

    def load(model: str, *, weights: str, weight_cache: str, threads: int, **_: object) -> Session:
        happened.append(f"loaded {model}, {weights}, {weight_cache}, {threads}")
        return Session()

    def opened(self: Path, mode: str) -> io.BytesIO:
        assert (str(self), mode) == ("/dev/stdin", "rb")
        happened.append("waited")
        return io.BytesIO()

    with monkeypatch.context() as patched:
        patched.setattr(share, "load", load)
        patched.setattr(os, "write", lambda *_: happened.append("said so"))
        patched.setattr(Path, "open", opened)
        share.child("a model", "int8", "a file")
    assert happened == ["loaded a model, int8, a file, 1", "generated 1", "said so", "waited", "closed"]


@pytest.mark.spec("BENCH-10")
def test_a_size_is_read_in_kibibytes_and_a_system_that_counts_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rollup = "00400000-7fff5a2d3000 ---p 00000000 00:00 0    [rollup]\nRss:      2000 kB\n"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", lambda _: f"{rollup}Pss:      1500 kB\nPss_Dirty:   7 kB\n")
        size = share._pss(1)
    assert size == 1500 * 1024
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", lambda _: rollup)
        with pytest.raises(GenerationError, match="does not report proportional set sizes"):
            share._pss(1)


@pytest.mark.spec("BENCH-10")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports proportional set sizes")
def test_bench_share_has_a_row_for_each_format_place_and_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str, str, bool]] = []
    done: list[None] = []

    def pss_of(processes: int, arguments: list[str]) -> list[int]:
        model, weights, place = arguments
        assert Path(model).is_dir()
        if place != ":memory":
            Path(place).touch()
        asked.append((processes, weights, Path(place).name, place == ":memory"))
        return [100 * processes, 101 * processes]

    monkeypatch.setattr(share, "_pss_of", pss_of)
    rows = list(share.share_rows(SHAPES["tiny"], lambda: done.append(None)))
    ways = [(name, mapped, n) for name in ("f32", "bf16") for mapped in (True, False) for n in (1, 2, 4)]
    assert [(row["format"], row["mapped"], row["processes"]) for row in rows] == ways
    assert [row["pss_bytes"] for row in rows] == [round(100.5 * n) for _, _, n in ways]
    assert asked == [(n, name, f"{name}.packed" if mapped else ":memory", not mapped) for name, mapped, n in ways]
    assert len(done) == share.BENCH.steps() == len(rows)
    keys = list(share.BENCH.columns.values())[: share.BENCH.keys]
    assert len({tuple(show(row) for show in keys) for row in rows}) == len(rows)  # its first columns name a row


@pytest.mark.spec("BENCH-10")
def test_a_system_that_does_not_report_sizes_is_named_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(share, "_pss_of", lambda *_: [1])
    with pytest.raises(GenerationError, match="bench share needs Linux"):
        next(share.share_rows(SHAPES["tiny"]))


@pytest.mark.spec("BENCH-10")
def test_the_title_names_the_size_of_the_model() -> None:
    assert f"{4 * GIGABYTE.n_parameters / 1e9:.2f} GB of float32" in share.BENCH.title
