"""The bench of starts. Speed itself is never judged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refinfer.bench import start
from refinfer.errors import GenerationError
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.packing.formats import FORMATS
from refinfer.weight_cache.format import MAGIC


@pytest.mark.slow
@pytest.mark.spec("BENCH-9")
def test_bench_start_measures_every_format_and_mode_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "FORMATS", {"int8": FORMATS["int8"]})
    result = start.start_bench(SHAPES["tiny"], rounds=1)
    rows = result["rows"]
    assert [(r["mode"], r["page_cache"], r["verify"]) for r in rows] == [
        ("none", "warm", True),
        ("none", "cold", True),
        ("build", "warm", True),
        ("build", "cold", True),
        ("load", "warm", True),
        ("load", "warm", False),
        ("load", "cold", True),
        ("load", "cold", False),
    ]
    keys = {"format", "mode", "page_cache", "verify", "open_s", "time_to_first_token_s", "peak_rss_bytes"}
    assert all(keys <= row.keys() and row["time_to_first_token_s"] >= row["open_s"] > 0 for row in rows)
    assert [row["ratio_to_none"] for row in rows[:2]] == [1, 1]
    for row in rows:
        numbers = [row[key] for key in ("checked_ratio", "least_checked_ratio", "read_alone_s", "check_alone_s")]
        if row["mode"] == "load" and row["verify"]:
            assert min(numbers) > 0
        else:
            assert numbers == [None] * 4
    assert 0 < result["base_rss_bytes"] <= rows[0]["peak_rss_bytes"] * 1.2


@pytest.mark.spec("BENCH-17")
@pytest.mark.parametrize(("cores", "check_s", "least"), [(1, 3, 2.5), (2, 3, 1.25), (2, 1, 0.75), (4, 3, 0.625)])
def test_warm_a_checked_start_is_compared_with_an_unchecked_one_and_with_cores_that_share_all_work(
    cores: int, check_s: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "usable_cores", lambda: cores)
    starts = {start.Start("load", "warm"): 4.0, start.Start("load", "warm", verify=False): 2.0}
    assert start._Round(starts, 7.0, check_s).checked_ratio("warm") == (2, least)


@pytest.mark.spec("BENCH-17")
@pytest.mark.parametrize(("unchecked", "read_s", "expected"), [(8, 5, (2, 0.4)), (5, 8, (2, 0.4)), (8, 2, (5, 1))])
def test_cold_a_checked_start_is_compared_with_the_better_of_an_unchecked_one_and_of_reading_alone(
    unchecked: float, read_s: float, expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "usable_cores", lambda: 2)
    starts = {
        start.Start("load", "cold"): 10.0,
        start.Start("load", "cold", verify=False): unchecked,
        start.Start("load", "warm", verify=False): 3.0,
    }
    assert start._Round(starts, read_s, 1.0).checked_ratio("cold") == expected


@pytest.mark.spec("BENCH-17")
def test_what_checking_costs_is_shown_beside_the_least_and_rows_of_older_versions_show_nothing() -> None:
    shown = start.BENCH.columns["checking"]
    assert shown({"checked_ratio": 1.392, "least_checked_ratio": 1.2}) == "1.39 (≥ 1.20)"
    assert shown({"checked_ratio": None}) == shown({}) == ""


@pytest.mark.spec("BENCH-17")
def test_reading_and_checking_alone_take_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"])
    start.run_start(tmp_path / "m", "int8", str(tmp_path / "w.packed"))
    assert start._read_s(tmp_path / "w.packed") > 0
    assert start._check_s(tmp_path / "w.packed") > 0


@pytest.mark.spec("BENCH-9")
def test_the_title_names_the_size_of_the_model() -> None:
    assert f"{4 * start.GIGABYTE.n_parameters / 1e9:.2f} GB of float32" in start.BENCH.title


@pytest.mark.spec("BENCH-9")
def test_a_start_that_fails_is_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"^a start failed: refinfer\.errors\.\w+: .*nothing here"):
        start.run_start(tmp_path / "nothing here", "int8", ":memory")


@pytest.mark.spec("BENCH-9")
@pytest.mark.parametrize(("written", "why"), [("a warning\nthe reason\n", "the reason"), ("\n", "exit status 3")])
def test_a_start_that_fails_is_named_with_the_last_line_it_wrote_or_with_how_it_ended(
    written: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=3, stderr=written)
    monkeypatch.setattr(start, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    with pytest.raises(GenerationError, match=f"^a start failed: {why}$"):
        start.run_start(tmp_path / "m", "int8", ":memory")


@pytest.mark.spec("BENCH-9")
@pytest.mark.parametrize("able", [True, False])
def test_a_page_cache_that_has_nothing_to_drop_or_drops_nothing_is_left_alone(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is not there yet, as before the first build, or a system that cannot be asked."""
    (tmp_path / "file").write_bytes(bytes(5000))
    if not able:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(os, "open", None if not able else os.open)
    start.drop_page_cache(tmp_path / ("nothing here" if able else "file"))
    start._read_through(tmp_path / "nothing here")


@pytest.mark.spec("BENCH-9")
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only some systems can be asked to drop pages")
def test_a_file_is_dropped_from_its_beginning_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda descriptor, *rest: asked.append((os.fstat(descriptor).st_size, *rest))
    )
    start.drop_page_cache(tmp_path / "file")
    assert asked == [(5000, 0, 0, os.POSIX_FADV_DONTNEED)]  # no length is up to the end of the file


@pytest.mark.spec("BENCH-9")
@pytest.mark.parametrize("verify", [True, False])
def test_a_start_generates_one_token_with_one_blas_thread(
    verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the session, which would generate as many tokens as it is asked for."""
    tokens: list[str] = []
    asked: dict[str, Any] = {}

    def generate(token_ids: list[int], max_tokens: int = 100) -> Iterator[str]:
        for _ in range(max_tokens):
            tokens.append("a")
            yield "a"

    def load(model: str, **options: Any) -> nullcontext[SimpleNamespace]:
        asked.update(options, model=model)
        return nullcontext(
            SimpleNamespace(generate=generate, stats=SimpleNamespace(to_json=lambda: {"n": len(tokens)}))
        )

    monkeypatch.setattr(start, "load", load)
    start.child("a model", "int8", "a file", str(verify), str(tmp_path / "report"))
    assert json.loads((tmp_path / "report").read_text()) == {"n": 1}
    names = ("model", "weights", "weight_cache", "verify", "threads")
    assert tuple(asked[name] for name in names) == ("a model", "int8", "a file", verify, 1)


@pytest.mark.spec("BENCH-9")
def test_a_start_loads_what_the_one_before_it_built(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"])
    states = [
        start.run_start(tmp_path / "m", "int4", place)["weight_cache"]["state"]
        for place in (":memory", str(tmp_path / "w.packed"), str(tmp_path / "w.packed"))
    ]
    assert states == ["memory", "built", "loaded"]


@pytest.mark.spec("BENCH-9", "BENCH-17")
def test_each_start_finds_the_files_that_its_row_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the starts: one that is given a file builds it if it is not there."""
    model, file = tmp_path / "m", tmp_path / "w.packed"
    sources = [model / "model.safetensors"]
    starts: list[tuple[str, bool]] = []
    prepared: list[tuple[str, Path]] = []

    def run_start(folder: Path, weights: str, place: str, *, verify: bool = True) -> dict[str, Any]:
        assert (folder, weights) == (model, "int8")
        assert place in (":memory", str(file))
        starts.append(("none" if place == ":memory" else "load" if file.exists() else "build", verify))
        if place != ":memory":
            file.write_bytes(MAGIC)
        seconds = float(2 ** len(starts))
        return {"weight_cache": {"load_or_build_s": seconds}, "time_to_first_token_s": seconds, "peak_rss_bytes": 1}

    def prepares(kind: str) -> Callable[[Path], None]:
        return lambda path: prepared.append((kind, path))

    monkeypatch.setattr(start, "run_start", run_start)
    monkeypatch.setattr(start, "drop_page_cache", prepares("cold"))
    monkeypatch.setattr(start, "_read_through", prepares("warm"))
    monkeypatch.setattr(start, "_read_s", lambda _: 1.0)
    monkeypatch.setattr(start, "_check_s", lambda _: 1.0)
    done: list[None] = []
    rows = list(start._rows("int8", model, sources, file, 2, lambda: done.append(None)))
    ways = [(row["mode"], row["verify"]) for row in rows]
    assert len(ways) == 8
    assert starts == [("build", True), *ways, *ways]
    assert prepared == [(row["page_cache"], path) for row in rows * 2 for path in (*sources, file)]
    assert len(done) == 2
    assert not file.exists()
    keys = list(start.BENCH.columns.values())[: start.BENCH.keys]
    assert len({tuple(show(row) for show in keys) for row in rows}) == len(rows)  # its first columns name a row
    compared = [(row["mode"], row["verify"]) for row in rows if row["checked_ratio"] is not None]
    assert compared == [("load", True)] * 2
    # each start takes twice as long as the one before it, and the first two of a round pack into memory
    warm_or_cold = {"warm": 0, "cold": 1}
    assert [row["ratio_to_none"] for row in rows] == [
        2.0 ** (warm_or_cold[row["page_cache"]] - number) for number, row in enumerate(rows)
    ]
