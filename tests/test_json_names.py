"""The names in what `--json` prints are a contract: names may be added, but not renamed or removed."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from refinfer.bench import arm, calibrate, decode, matmul, offload, pack, share, start
from refinfer.cli.main import COMMANDS, main, make_parser
from refinfer.model.config import SHAPES
from refinfer.packing.formats import FORMATS
from refinfer.planning.paper import PUBLISHED
from refinfer.planning.plan import PLANS

GOLDEN: dict[str, list[str]] = json.loads((Path(__file__).parent / "golden" / "json_names.json").read_text())
SLOW = {"lab check", "lab grade", "bench offload", "bench share", "bench start", "simulate --paper"}
CASES = [pytest.param(command, marks=pytest.mark.slow if command in SLOW else ()) for command in GOLDEN]
FIGURES = Path(__file__).parents[1] / "docs" / "figures"

# Names are written as dotted paths, elements of lists together as `[]`. Keys that are data, not names, are written as
# `{}`: they are those of plans, of what plans are compared with, and of the gains that the paper reports.
DATA = {*PLANS, "synchronous", "mmap", "belady", *PUBLISHED}

# What a machine may not have: then nothing stands below these.
OPTIONAL = ("cgroup", "blas[]")

# What a command needs besides its name in the golden file.
OPTIONS = {
    **dict.fromkeys(("plan", "simulate"), "--shape tiny"),
    "lab check": "1",
    "lab grade": "refinfer-labs",
    **dict.fromkeys(("cache info", "cache verify", "cache rm"), "--all"),
    **dict.fromkeys((name for name in GOLDEN if name.startswith("generate")), "--max-tokens 2"),
}


def names_in(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for element in value:
            yield from names_in(element, f"{path}[]")
    elif isinstance(value, dict):
        for key, below in value.items():
            name = f"{path}.{'{}' if key in DATA else key}".removeprefix(".")
            yield name
            yield from names_in(below, name)


def missing(wanted: list[str], got: set[str]) -> list[str]:
    parents = {name.rpartition(".")[0] for name in got}
    lost = [(name, name.rpartition(".")[0]) for name in wanted if name not in got]
    return [name for name, parent in lost if parent in parents or not parent.endswith(OPTIONAL)]


def commands_with_json(parser: argparse.ArgumentParser, name: str = "") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from commands_with_json(below, f"{name} {word}".lstrip())
        elif "--json" in action.option_strings:
            yield name


@pytest.fixture
def small_benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bench measures little, and once, on any machine; an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tiny = SHAPES["tiny"]
    monkeypatch.setattr(calibrate, "_COLD_BYTES", 16 << 20)
    usual = calibrate.calibrate.__kwdefaults__ or {}
    monkeypatch.setattr(calibrate.calibrate, "__kwdefaults__", usual | {"nbytes": 16 << 20, "rounds": 1})
    monkeypatch.setattr(decode, "DECODE_SHAPES", decode.DECODE_SHAPES[:1])
    monkeypatch.setattr(decode, "decode_rows", partial(decode.decode_rows, rounds=1))
    monkeypatch.setattr(matmul, "_STREAMED_BYTES", 0)
    monkeypatch.setattr(matmul, "machine_limits", partial(matmul.machine_limits, rounds=1))
    monkeypatch.setattr(matmul, "matmul_rows", partial(matmul.matmul_rows, [(128, 96)], [1], rounds=1))
    arms = [arm.Arm("f32", 0.75, "optimal"), arm.Arm("f32", 0.75, "mmap", 0)]
    monkeypatch.setattr(offload, "arms", lambda **_: arms)
    monkeypatch.setattr(offload, "can_limit_memory", lambda: True)
    monkeypatch.setattr(arm, "_memory_group", lambda _: contextlib.nullcontext())
    usual = offload.offload_bench.__kwdefaults__ or {}
    small = usual | {"config": SHAPES["stories15m"], "rounds": 1}
    monkeypatch.setattr(offload.offload_bench, "__kwdefaults__", small)
    monkeypatch.setattr(pack, "pack_bench_rows", partial(pack.pack_bench_rows, (64, 96), rounds=1))
    monkeypatch.setattr(share, "_FORMATS", ("f32",))
    monkeypatch.setattr(share, "_PROCESSES", (1,))
    monkeypatch.setattr(share, "share_rows", partial(share.share_rows, tiny))
    monkeypatch.setattr(start, "FORMATS", {"int8": FORMATS["int8"]})
    monkeypatch.setattr(start, "_STARTS", start._STARTS[:1])
    monkeypatch.setattr(start, "start_bench", partial(start.start_bench, tiny, rounds=1))


@pytest.mark.usefixtures("small_benches")
@pytest.mark.spec(
    "CLI-18", "CLI-2", "CLI-7", "CLI-10", "CLI-11", "CLI-12", "CLI-13", "CLI-14", "CLI-15", "CLI-17", "BENCH-13"
)
@pytest.mark.parametrize("command", CASES)
def test_a_command_still_prints_every_name_of_its_json(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "bench share" and not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("only Linux reports proportional set sizes")
    if command.startswith("cache "):
        assert main(["pack"]) == 0  # there is a file to describe
        capsys.readouterr()
    if command.startswith("lab "):
        monkeypatch.chdir(tmp_path)
        assert main(["lab", "start", "--only", "1"]) == 0
        assert main(["lab", "solution", "--give-up", "--apply"]) == 0
        capsys.readouterr()
    assert main([*command.split(), *OPTIONS.get(command, "").split(), "--json"]) == 0
    got = set(names_in(json.loads(capsys.readouterr().out)))
    lost = missing(GOLDEN[command], got)
    assert not lost, f"refinfer {command} --json no longer has {', '.join(lost)}: names may be added, none may go"


@pytest.mark.spec("CLI-18", "BENCH-13")
def test_every_command_that_prints_json_has_its_names_in_the_golden_file() -> None:
    lost = {command for name in COMMANDS for command in commands_with_json(make_parser([name]))} - set(GOLDEN)
    assert not lost, f"tests/golden/json_names.json does not say which names {', '.join(sorted(lost))} has"


@pytest.mark.spec("CLI-18", "BENCH-8", "BENCH-13")
@pytest.mark.parametrize("file", sorted(FIGURES.glob("*.json")), ids=lambda file: file.name)
def test_every_name_in_a_committed_figure_is_still_one(file: Path) -> None:
    """Fields that came later may be missing there until it is measured again."""
    command = {
        "heavy": "bench offload",
        "matmul_haswell": "bench matmul",
        "offload_haswell": "bench offload",
        "paper": "simulate --paper",
    }.get(file.stem, f"bench {file.stem}")
    lost = sorted(set(names_in(json.loads(file.read_text()))) - set(GOLDEN[command]))
    assert not lost, f"docs/figures/{file.name} has {', '.join(lost)}, and refinfer {command} --json no longer does"
