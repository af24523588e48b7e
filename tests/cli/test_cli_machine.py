"""The commands `doctor` and `bench`: what they print, for people and as JSON, and what each bench offers."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from refinfer.bench import abilities, matmul, offload
from refinfer.cli.machine import _facts, benches, print_bench
from refinfer.cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
from command_line import on_terminal, refused, run


@pytest.mark.spec("CLI-7", "BENCH-3")
def test_doctor_describes_the_machine() -> None:
    status, out, _ = run("doctor", "--json")
    machine = json.loads(out)
    assert status == 0
    assert machine["cores"] >= 1
    assert machine["page_bytes"] >= 4096
    assert {"cpu", "memory_bytes", "cgroup", "memlock_limit_bytes", "folder", "blas", "numpy", "python"} <= set(machine)
    assert {"path", "file_system", "direct_io", "read_ahead_kb"} == set(machine["folder"])
    status, out, _ = run("doctor")
    assert status == 0
    facts = dict(re.findall("^│ ([^│]+?) +│ ([^│]+?) +│$", out, flags=re.MULTILINE))
    assert (facts["cores for this process"], facts["numpy"]) == (str(machine["cores"]), machine["numpy"])
    assert facts["page of memory"] == f"{machine['page_bytes']} bytes"
    assert facts["this folder"] == machine["folder"]["path"]


UNKNOWN = {
    "cpu": "a processor", "cores": 3, "memory_bytes": None, "memory_available_bytes": None, "cgroup": None,
    "memlock_limit_bytes": None, "page_bytes": 4096, "blas": [], "numpy": "9.8", "python": "3.21", "system": "a system",
    "folder": {"path": "/here", "file_system": None, "direct_io": None, "read_ahead_kb": None},
}  # fmt: skip
KNOWN = UNKNOWN | {
    "memory_bytes": 8_000_000, "memory_available_bytes": 7_000_000, "memlock_limit_bytes": 6_000_000,
    "cgroup": {"version": 2, "memory_limit_bytes": 5_000_000, "memory_used_bytes": 4_000_000},
    "blas": [{"name": "ablas", "version": "1.2", "core": "acore", "threads": 5}],
    "folder": {"path": "/here", "file_system": "afs", "direct_io": True, "read_ahead_kb": 0},
}  # fmt: skip
SHOWN = {
    "processor": "a processor", "cores for this process": "3", "page of memory": "4096 bytes",
    "this folder": Path("/here"), "numpy": "9.8", "Python": "3.21", "system": "a system",
}  # fmt: skip


def shown(machine: dict[str, Any]) -> dict[Any, Any]:
    """Return what the table of `doctor` has in its rows."""
    return {what: value for what, value in _facts(machine)}  # noqa: C416  (mypy cannot tell a row from a list)


@pytest.mark.spec("CLI-7", "CLI-25")
def test_doctor_shows_each_figure_and_says_of_each_that_is_not_reported_that_it_is_not_known() -> None:
    assert shown(UNKNOWN) == SHOWN | {
        "memory": "not known", "memory that is left": "not known", "control group": "none",
        "limit on locked memory": "none, or not known", "its file system": "not known",
        "direct reads there": "cannot be tried", "read-ahead there": "not known",
    }  # fmt: skip
    assert shown(KNOWN) == SHOWN | {
        "memory": "8.0 MB", "memory that is left": "7.0 MB", "control group": "version 2",
        "memory limit of the group": "5.0 MB", "memory used by the group": "4.0 MB", "limit on locked memory": "6.0 MB",
        "its file system": "afs", "direct reads there": "yes", "read-ahead there": "0 kB",
        "BLAS": "ablas 1.2, acore, 5 threads",
    }  # fmt: skip
    no_limit = KNOWN | {"cgroup": {"version": 1, "memory_limit_bytes": None, "memory_used_bytes": None}}
    assert "memory limit of the group" not in shown(no_limit)


@pytest.mark.spec("CLI-22")
def test_doctor_ends_with_a_verdict_on_each_ability() -> None:
    machine = json.loads(run("doctor", "--json")[1])
    _, out, _ = run("doctor")
    lines = out[out.index("What this machine can do") :].splitlines()[1:]
    for verdict, said, needed in zip(machine["abilities"], lines[::2], lines[1::2], strict=True):
        assert said.startswith(f"{'yes' if verdict['works'] else 'no ':5}{verdict['ability']}: ")
        assert needed.startswith(f"     for {', '.join(verdict['needed_by'])}")
        assert needed.endswith(verdict["needed_by"][-1] if verdict["works"] else f": {verdict['without']}")


@pytest.mark.spec("CLI-22")
def test_doctor_says_what_to_do_about_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    monkeypatch.setattr(abilities, "can_limit_memory", lambda: False)
    _, out, _ = run("doctor")
    expected = """\
no   memory limits by control groups: /sys/fs/cgroup/memory cannot be written;
     be root, on a system with control groups of version 1
     for bench offload: its mmap arm is left out, and nothing limits the other
       arms
"""
    assert expected in out
    expected = """\
no   the tokenizers package, for other tokenizers than refinfer's own: it is not
     installed; run pip install 'refinfer[hf]'
     for generate --model: give the prompt as --token-ids
"""
    assert expected in out


@pytest.mark.spec("BENCH-13")
def test_json_is_one_object_whose_rows_are_written_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"number": number}
            written.append(capsys.readouterr().out)

    one = replace(offload.BENCH, measure=lambda progress, **_: {"rounds": 1, "rows": rows()})
    monkeypatch.setattr(offload, "BENCH", one)
    assert main(["bench", "offload", "--json"]) == 0
    written.append(capsys.readouterr().out)
    for number, text in enumerate(written[:3]):
        assert f'{{"number": {number}}}' in text
    result = json.loads("".join(written))
    assert list(result) == ["machine", "rounds", "rows"]
    assert result["rows"] == [{"number": 0}, {"number": 1}, {"number": 2}]


@pytest.mark.spec("BENCH-3")
def test_a_table_of_a_bench_names_the_machine_below(capsys: pytest.CaptureFixture[str]) -> None:
    print_bench(offload.BENCH, {"rows": []}, KNOWN)
    shown = " ".join(capsys.readouterr().out.split())
    assert offload.BENCH.title in shown
    assert " on a processor, 3 cores; numpy 9.8, ablas 1.2 " in shown


@pytest.mark.spec("BENCH-15")
def test_the_limits_of_this_machine_are_below_the_table_for_each_number_of_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = {"read_gb_per_s": 9.87, "read_4k_gb_per_s": 6.54, "sgemm_gflop_per_s": 98.7}
    limits = {"by_threads": [{"threads": 1, **figures}, {"threads": 3, **figures}]}
    print_bench(matmul.BENCH, {"rows": [], "limits": limits}, KNOWN)
    shown = " ".join(capsys.readouterr().out.split())
    for threads in (1, 3):
        assert f"BLAS threads: {threads}, which read 9.9 GB/s, in small pages 6.5 GB/s, and multiply 99 G" in shown


@pytest.mark.spec("BENCH-13")
def test_a_row_reaches_a_pipe_or_a_file_as_soon_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(2):
            yield {"number": number}
            written.append((tmp_path / "out").read_text())

    monkeypatch.setattr(offload, "BENCH", replace(offload.BENCH, measure=lambda *_, **__: {"rows": rows()}))
    with (tmp_path / "out").open("w") as out, contextlib.redirect_stdout(out):
        assert main(["bench", "offload", "--json"]) == 0
    for number, text in enumerate(written):
        assert text.endswith(f'{{"number": {number}}}')


@pytest.mark.spec("BENCH-13")
def test_rows_for_people_are_measured_while_the_bar_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(progress: Callable[[], None], **_: bool) -> dict[str, Any]:
        def rows() -> Iterator[dict[str, Any]]:
            sys.stderr.write("a row is measured\n")
            progress()
            yield from ()

        return {"rows": rows()}

    monkeypatch.setattr(offload, "BENCH", replace(offload.BENCH, measure=measure, steps=lambda **_: 1))
    monkeypatch.setattr("refinfer.cli.machine.describe_machine", lambda _: KNOWN)
    shown = on_terminal(lambda: main(["bench", "offload"]), 80)
    assert re.search("a row is measured.*measuring .*100%", shown, re.DOTALL)


@pytest.mark.spec("BENCH-3", "CLI-4")
def test_a_bench_without_a_name_is_refused() -> None:
    assert "the following arguments are required: NAME" in refused("bench")


@pytest.mark.spec("BENCH-3")
def test_the_list_of_benches_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of(capsys).split())
    assert all(f" {name} {bench.summary}" in shown for name, bench in benches().items())


@pytest.mark.spec("BENCH-3", "CLI-3")
@pytest.mark.parametrize("name", benches())
def test_the_help_of_a_bench_shows_what_it_measures_and_only_its_own_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, shown = benches()[name], help_of(capsys, name)
    flat = " ".join(shown.split())
    assert bench.title in flat
    assert all(f" {term} {text}" in flat for term, text in bench.notes.items())
    options = {f"--{flag.replace('_', '-')}" for flag in bench.flags}
    assert set(re.findall(r"^  (--[a-z-]+)", shown, flags=re.MULTILINE)) == options | {"--json"}
    assert options == ({"--quick", "--compute-heavy"} if name == "offload" else set())


def help_of(capsys: pytest.CaptureFixture[str], *name: str) -> str:
    with pytest.raises(SystemExit):
        main(["bench", *name, "--help"])
    return capsys.readouterr().out


@pytest.mark.spec("BENCH-11", "BENCH-12")
def test_the_options_of_a_bench_reach_its_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict[str, bool]] = []

    def measure(progress: object, **flags: bool) -> dict[str, Any]:
        got.append(flags)
        return {"rows": []}

    monkeypatch.setattr(offload, "BENCH", replace(offload.BENCH, measure=measure))
    for options in ([], ["--quick"], ["--compute-heavy", "--quick"]):
        assert run("bench", "offload", *options, "--json")[0] == 0
    assert got == [
        {"quick": False, "compute_heavy": False},
        {"quick": True, "compute_heavy": False},
        {"quick": True, "compute_heavy": True},
    ]


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize("option", ["--quick", "--compute-heavy"])
@pytest.mark.parametrize("name", [name for name in benches() if name != "offload"])
def test_an_option_of_one_bench_is_refused_for_another(name: str, option: str) -> None:
    assert f"unrecognized arguments: {option}" in refused("bench", name, option)


@pytest.mark.spec("BENCH-3")
def test_the_command_line_offers_every_bench() -> None:
    names = [path.stem for path in Path(offload.__file__).parent.glob("*.py") if path.stem != "__init__"]
    modules = {name: import_module(f"refinfer.bench.{name}") for name in names}
    assert benches() == {name: module.BENCH for name, module in modules.items() if hasattr(module, "BENCH")}
