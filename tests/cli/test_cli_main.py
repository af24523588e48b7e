"""The command line as a whole: its commands, its exit statuses, its streams, one clear line for every bad input."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO

import pytest

from refinfer.cli.main import COMMANDS, main, make_parser

sys.path.insert(0, str(Path(__file__).parent))
from command_line import program, refused, run


def generate_into(stdout: IO[str] | int) -> subprocess.CompletedProcess[bytes]:
    """Run a real generation whose standard output goes to `stdout`."""
    return subprocess.run(program("generate", "--max-tokens", "20"), stdout=stdout, stderr=subprocess.PIPE, check=False)


@pytest.mark.spec("CLI-3", "ERR-2")
@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--bud", "40%"],
        ["generate", "--max-tok", "4"],
        ["generate", "--budget", "60%", "--plan", "best"],
        ["generate", "a", "b"],
        ["bench", "everything"],
        ["pack", "--format", "int8"],
        ["cache"],
    ],
    ids=" ".join,
)
def test_what_does_not_exist_is_refused(argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.spec("CLI-23", "CLI-3")
@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["generate", "--bud", "40%"], "refinfer generate"),
        (["generate", "--max-tokens", "0"], "refinfer generate"),
        (["generate", "--budget"], "refinfer generate"),
        (["plan", "--shape", "tiny", "extra"], "refinfer plan"),
        (["bench", "offload", "--fast"], "refinfer bench offload"),
        (["bench", "pack", "--json", "--quick"], "refinfer bench pack"),
        (["bench", "everything"], "refinfer bench"),
        (["cache", "rm", "--al"], "refinfer cache rm"),
        (["cache", "rm"], "refinfer cache rm"),
        (["cache"], "refinfer cache"),
        (["--fast", "doctor"], "refinfer"),
        (["nonsense"], "refinfer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_complaint_names_the_help_of_its_own_command(argv: list[str], command: str) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.endswith(f" (see {command} --help)\n")


MISUSED = [
    "--budget", "--max-tokens", "--seed", "--temperature", "--top-k", "--top-p", "--threads", "--token-ids",
    "--weights", "--plan", "--prefetch-threads", "--prefetch-ring", "--disk-bandwidth", "--model", "--nonsense",
]  # fmt: skip


@pytest.mark.spec("CLI-4", "INPUT-3", "UNIT-3")
@pytest.mark.parametrize("option", MISUSED)
@pytest.mark.parametrize(
    "value",
    ["a\nb\r\n\tc", "x" * 70_000, "٣", "1_0", "nan", "1\n2"],
    ids=["lines", "long", "arabic", "_", "nan", "1 2"],
)
def test_any_misuse_of_an_option_ends_in_one_short_line(option: str, value: str) -> None:
    status, out, err = run("generate", option, value)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("refinfer: ")
    assert err.endswith("\n")
    assert len(err) <= len("refinfer: ") + 1500 + 1


@pytest.mark.spec("CLI-4", "INPUT-3")
@pytest.mark.parametrize("argv", [["x" * 70_000], ["generate", "a", "b\n" * 9_000], ["cache", "info", "x" * 70_000]])
def test_a_long_wrong_argument_ends_in_one_short_line(argv: list[str]) -> None:
    line = refused(*argv)
    assert len(line) <= len("refinfer: ") + 1500
    assert "..." in line


@pytest.mark.spec("CLI-4", "ERR-2")
@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "é"], "no token for the character 'é'"),
        (["generate", "a" * 600], "context of 512 positions"),
        (["generate", "--max-tokens", "0"], "must be at least 1, not 0"),
        (["generate", "--max-tokens", "-3"], "must be at least 1, not -3"),
        (["generate", "--max-tokens", "many"], "'many' is not a whole number"),
        (["generate", "--max-tokens", "100000"], "do not fit"),
        (["generate", "--temperature", "nan"], "'nan' is not a number"),
        (["generate", "--temperature", "-1"], "temperature must be a number"),
        (["generate", "--temperature", "warm"], "'warm' is not a number"),
        (["generate", "--top-p", "2"], "top-p must be above 0 and at most 1"),
        (["generate", "--top-k", "-1"], "must be at least 0"),
        (["generate", "--seed", "-1"], "must be at least 0"),
        (["generate", "--threads", "0"], "must be at least 1"),
        (["generate", "--weights", "fp8"], "invalid choice: 'fp8'"),
        (["generate", "--weight-cache", ":somewhere"], "neither :memory nor a file"),
        (["generate", "--weight-cache", "/"], "is not a file; give a file name"),
        (["generate", "--plan", "leading"], "--plan can be used only within a budget; give --budget too"),
        (["generate", "--budget", "lots"], "is not a size"),
        (["generate", "--budget", "1kB"], "the smallest that works"),
        (["generate", "--budget", "60%", "--weight-cache", "off"], "which a budget needs; name a file"),
        (["generate", "--budget", "60%", "--prefetch-threads", "-1"], "must be at least 0"),
        (["generate", "--threads", "9" * 30], "threads must be a whole number from 1 to 1024"),
        (["generate", "--model", "m" * 300], "cannot be read"),
        (["synth", "m" * 300, "--shape", "tiny"], "cannot be made"),
        (["synth", "x", "--shape", "tiny", "--shard-size", "9" * 400 + "TB"], "less than 2^63"),
        (["generate", "--token-ids", "1,two"], "not a list of token ids"),
        (["generate", "--token-ids", "999"], "token id 999 is not in the vocabulary"),
        (["generate", "--token-ids", "1", "ROMEO"], "a prompt and --token-ids were both given"),
        (["generate", "--model", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["synth", "x", "--shape", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["synth", "x"], "--shape"),
        (["synth", "x", "--shape", "tiny", "--shard-size", "3 apples"], "not a size such as 300MB"),
        (["synth", "x", "--shape", "tiny", "--shard-size", "0"], "at least one byte"),
        (["synth", "/", "--shape", "tiny"], "is not an empty folder"),
        (["synth", "/dev/null/x", "--shape", "tiny"], "/dev/null/x"),
        (["lab", "check", "--seconds", "0"], "must be more than 0 and at most 86400, not 0"),
        (["plan", "--shape", "tiny", "--plan", "math:pi"], "math:pi is 3.14159"),
        (["--"], "the following arguments are required: COMMAND"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_line_and_status_2(argv: list[str], why: str) -> None:
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert why in err


@pytest.mark.spec("CLI-5", "ERR-2")
def test_ctrl_c_ends_with_status_130_and_one_line(tmp_path: Path) -> None:
    assert main(["synth", str(tmp_path / "m"), "--shape", "stories15m"]) == 0
    argv = program("generate", "--model", str(tmp_path / "m"), "--token-ids", "1", "--max-tokens", "255")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # the first piece of text: it is generating now
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"refinfer: interrupted\n"
    assert process.returncode == 130


@pytest.mark.spec("CLI-5")
@pytest.mark.parametrize("module", ["refinfer.cli.main", "refinfer.cli.generate", "numpy"])
def test_ctrl_c_while_the_program_starts_is_answered_the_same(module: str) -> None:
    """The interrupt comes out of an import: of the command line, of a command, of what it needs."""
    code = (
        "import sys, importlib.abc\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == sys.argv[2]: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from refinfer.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "generate", module], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"refinfer: interrupted\n")


@pytest.mark.spec("CLI-34")
def test_whoever_imports_the_module_that_starts_the_program_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function is imported from there by the script that pip installs, and by processes that are started afresh."""
    monkeypatch.delitem(sys.modules, "refinfer.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["refinfer", "--version"])
    assert callable(import_module("refinfer.__main__").main)


@pytest.mark.spec("CLI-4", "CLI-1")
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(tmp_path: Path) -> None:
    main(["synth", str(tmp_path / "m"), "--shape", "tiny"])
    argv = program("generate", "é", "--model", str(tmp_path / "m"), "--max-tokens", "3")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(argv, capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(b"?")


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "2>/dev/full"])
def test_closed_and_full_streams_change_no_exit_status(closed: str) -> None:
    command = " ".join(program("generate", "--max-tokens", "{}")) + " " + closed
    statuses = [
        subprocess.run(command.format(n), shell=True, capture_output=True, check=False).returncode for n in (0, 2)
    ]
    assert statuses == ([2, 0] if closed != "2>/dev/full" else [2, 1])


@pytest.mark.spec("ERR-2")
def test_a_lack_of_memory_is_one_line_and_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("refinfer.cli.cache.prepare", lack)
    status, out, err = run("pack", "-q", "-o", tmp_path / "packed")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "there is not enough memory for this" in err


@pytest.mark.spec("CLI-8")
def test_a_reader_that_closes_the_pipe_early_ends_the_program_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = generate_into(write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.spec("CLI-4")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = generate_into(full)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


@pytest.mark.spec("CLI-7", "CLI-34")
def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--version", "refinfer 0."), ("-V", "refinfer 0."), ("--help", "generate")):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


def parsers(name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the parser of a command, and those below it, each under what is typed for it."""
    pending = [(word, below) for word, below in children(make_parser([name])) if word == name]
    while pending:
        typed, parser = pending.pop()
        yield typed, parser
        pending += [(f"{typed} {word}", below) for word, below in children(parser)]


def children(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [pair for choices in found for pair in choices.items()]


@pytest.mark.spec("CLI-7")
def test_help_shows_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} {text}" in shown for name, (_, text) in COMMANDS.items())


@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_that_names_its_default_and_a_word_for_its_value(name: str) -> None:
    for typed, parser in parsers(name):
        assert parser.description
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            text = (action.help or "").replace("%%", "%")
            assert len(text) >= len("print JSON"), f"refinfer {typed} {action.dest}"
            if action.default not in (None, False, argparse.SUPPRESS):
                assert "(default: " in text, f"refinfer {typed} {action.dest}"
            if action.option_strings and action.nargs != 0:
                assert action.metavar or action.choices, f"refinfer {typed} {action.dest}"


@pytest.mark.slow
@pytest.mark.spec("CLI-7")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_only_its_own_module_of_this_room(name: str) -> None:
    """And neither `generate` nor `--help` imports what it has no use for."""
    code = (
        "import contextlib, io, sys\n"
        "from refinfer.cli.main import make_parser\n"
        "make_parser(sys.argv[1:])\n"
        "print(*(name for name in sys.modules if name.startswith(('refinfer.', 'numpy'))))\n"
    )

    def imported(*argv: str) -> set[str]:
        command = [sys.executable, "-c", code, *argv]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    families = {f"refinfer.cli.{module}" for module, _ in COMMANDS.values()}
    own = f"refinfer.cli.{COMMANDS[name][0]}"
    got = imported(name)
    assert got & families == {own}
    assert any(module.startswith("refinfer.bench") for module in got) == (own == "refinfer.cli.machine")
    assert not imported("--help") & {"numpy", *families}
