"""Every command in a terminal of 80 columns: nothing is too wide, and no name is broken."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

from refinfer.bench import pack
from refinfer.bench.machine import describe_machine
from refinfer.cli.machine import benches, print_bench
from refinfer.cli.main import COMMANDS, main, make_parser
from refinfer.generate import STORYTELLER
from refinfer.planning.paper import PUBLISHED
from refinfer.planning.plan import PLANS

sys.path.insert(0, str(Path(__file__).parent))
from command_line import on_terminal, run

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
WIDTHS = [60, 80, 120]
NAME = "a model with a rather long name of its own"
FILE = f"{NAME.replace(' ', '-')}-bf16-FINGERPRINT.packed"
SHORT = {"attention-first": "attn-first", "synchronous": "sync"}
SWEEP = [SHORT.get(arm, arm) for arm in (*PLANS, "synchronous", "mmap", "ideal")]

# A command, and names that must be in one piece in what it prints.
SHOWN: list[tuple[list[str], list[str]]] = [
    (["plan", "--shape", "smollm-135m"], [*PLANS, "gate_proj", "KV cache"]),
    (["simulate", "--shape", "tiny", "--device", "emmc"], ["disk 1", "emmc", *SWEEP]),
    (["simulate", "--paper"], ["codellama-34b,", *PUBLISHED]),
    (["doctor"], ["ext4" if sys.platform == "linux" else "numpy", "bench start,", "bench calibrate,"]),
    (["generate", "--max-tokens", "3", "--budget", "60%"], ["KV", "resident", "tokens/s:"]),
    (["cache", "list"], [FILE, NAME, "4.8 MB"]),
    (["cache", "info", "--all"], [FILE, NAME, "4.8 MB,"]),
    (["cache", "verify", "--all"], [f"{FILE}:", "good"]),
    (["cache", "path", NAME, "--weights", "int8"], [FILE.replace("bf16", "int8")]),
    (["pack", NAME], [FILE, "44 buffers,"]),
    (["bench", "pack"], ["f32-nr32-kr1", "64 x 96", "f32-nrN-krM"]),
    (["cache", "rm", "--all"], [f"{FILE},", "4.8 MB"]),
]


@pytest.fixture
def short_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model and its cache file, in folders whose names are shorter than those that pytest makes."""
    with tempfile.TemporaryDirectory(prefix="r") as short:
        shutil.copytree(STORYTELLER, Path(short) / NAME)
        monkeypatch.chdir(short)
        monkeypatch.setenv("XDG_CACHE_HOME", short)
        monkeypatch.setattr(pack, "pack_bench_rows", partial(pack.pack_bench_rows, (64, 96), rounds=1))
        assert run("pack", NAME)[0] == 0
        yield


def require(text: str, columns: int, names: Iterable[str]) -> None:
    """Require that no line of more than one word is longer than that, and that names are in one piece."""
    lines = text.replace(NAME, NAME.replace(" ", "-")).splitlines()  # a name is one word, whatever its folder is called
    too_long = [line for line in lines if len(line.rstrip()) > columns and len(line.split()) > 1]
    assert not too_long, "\n".join(too_long)
    text = re.sub(r"[0-9a-f]{16}", "FINGERPRINT", text)
    for name in names:
        assert re.search(rf"(?<![^\s/]){re.escape(name)}(?!\S)", text), f"{name} is not in one piece:\n{text}"


@pytest.mark.usefixtures("short_names")
@pytest.mark.spec("CLI-20")
@pytest.mark.parametrize("columns", WIDTHS)
def test_no_command_prints_a_line_too_long_or_breaks_a_name(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for argv, names in SHOWN:
        status, out, err = run(*argv)
        assert status == 0, err
        require(out + err, columns, names)


@pytest.mark.slow
@pytest.mark.usefixtures("short_names")
@pytest.mark.spec("CLI-20", "CLI-21")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_command_prints_a_line_too_long_on_a_terminal(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    for argv, names in SHOWN:
        shown = on_terminal(partial(main, argv), 80)
        require(shown, 80, names)


@pytest.mark.usefixtures("short_names")
@pytest.mark.spec("CLI-20")
def test_in_a_pipe_tables_have_120_columns_and_other_lines_stay_whole() -> None:
    _, out, _ = run("simulate", "--shape", "tiny")
    assert out.splitlines()[-1].startswith("assuming: ")
    assert max(map(len, out.splitlines()[:-1])) in range(110, 121)
    assert [len(line) for line in out.splitlines() if line.startswith("  compute ")] == [118]


@pytest.mark.spec("CLI-20")
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", ["heavy", "matmul", "offload", "share", "start"])
def test_no_bench_prints_a_line_too_long_or_breaks_a_name(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = json.loads((FIGURES / f"{name}.json").read_text())
    bench = benches()["offload" if name == "heavy" else name]
    print_bench(bench, result, result["machine"])
    cells = {show(row) for row in result["rows"] for show in bench.columns.values()} - {""}
    require(capsys.readouterr().out, columns, [*cells, *bench.notes])


@pytest.mark.spec("CLI-20")
@pytest.mark.parametrize("columns", WIDTHS)
def test_the_benches_without_figures_fit_too(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    common = {"ratio_quartiles": [0.5, 11.5], "tokens_per_s": 12345.6, "naive_tokens_per_s": 1234.5}
    decoded = {"hidden_size": 2048, "num_hidden_layers": 22, "ratio_to_naive": 10.5, **common}
    product = {"what": "product", "format": "int4", "m": 256, "chunk_bytes": 593_920, "ns_per_byte": 0.34}
    for name, row, names in (
        ("decode", decoded, ["2048 x 22", "0.50 - 11.50", "12,346"]),
        ("calibrate", product, ["product int4", "594 kB", "2.94"]),
    ):
        print_bench(benches()[name], {"rows": [row]}, describe_machine(Path.cwd()))
        require(capsys.readouterr().out, columns, names)


def commands() -> Iterator[list[str]]:
    """Yield every command as it is typed, down to the actions of `cache` and the names of benches."""
    yield []
    for name in COMMANDS:
        parser = make_parser([name])
        for word, below in below_of(parser):
            if word == name:
                yield [name]
                yield from ([name, deeper] for deeper, _ in below_of(below))


def below_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def help_of(argv: list[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([*argv, "--help"])


@pytest.mark.spec("CLI-20")
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("argv", list(commands()), ids=lambda argv: " ".join(argv) or "refinfer")
def test_help_fits_and_breaks_no_name(
    argv: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    help_of(argv)
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: refinfer {' '.join(argv)}".rstrip())
    names = ["virtual-disk", "attention-first,", "bf16,"] if argv in (["plan"], ["simulate"]) else []
    require(shown, columns, names)
