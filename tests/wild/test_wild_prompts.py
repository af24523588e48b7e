"""In the wild: where people take a prompt from."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import WATCHDOG_S, program, refused, run

SHORT = ("--max-tokens", "3", "--temperature", "0", "-q")

# The bytes in a file or a pipe, and the prompt that they are.
MET = {
    "a text without an end of line": (b"JULIET:", "JULIET:"),
    "what echo writes": (b"JULIET:\n", "JULIET:"),
    "what Windows writes": (b"JULIET:\r\n", "JULIET:"),
    "what Notepad writes": (b"\xef\xbb\xbfJULIET:", "JULIET:"),
    "an empty line at the end stays": (b"JULIET:\n\n", "JULIET:\n"),
    "several lines": (b"JULIET:\nO Romeo", "JULIET:\nO Romeo"),
    "a dash": (b"-", "-"),
    "a text like an option": (b"--help", "--help"),
}


def given(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.spec("CLI-30")
@pytest.mark.parametrize("name", MET)
def test_a_prompt_comes_from_standard_input_or_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, prompt = MET[name]
    wanted = run("generate", *SHORT, "--", prompt) if prompt != "-" else None
    given(monkeypatch, data)
    status, out, err = run("generate", "-", *SHORT)
    assert (status, err) == (0, "")
    assert out.startswith(prompt)
    assert wanted in (None, (status, out, err))
    (tmp_path / "prompt.txt").write_bytes(data)
    assert run("generate", "--prompt-file", tmp_path / "prompt.txt", *SHORT) == (status, out, err)


@pytest.mark.spec("CLI-30")
def test_a_pipe_is_a_prompt_file_too(tmp_path: Path) -> None:
    script = 'printf "JULIET:\\n" | "$0" -m refinfer generate --prompt-file /dev/stdin ' + " ".join(SHORT)
    done = subprocess.run(
        ["sh", "-c", script, sys.executable], capture_output=True, text=True, check=False, timeout=WATCHDOG_S
    )
    assert (done.returncode, done.stdout) == (0, run("generate", "JULIET:", *SHORT)[1])


@pytest.mark.spec("CLI-30")
def test_a_pipe_that_nobody_asked_for_is_not_waited_for() -> None:
    read_end, write_end = os.pipe()  # under ssh or cron: nothing comes, and it never ends
    try:
        argv = program("generate", "JULIET:", *SHORT)
        done = subprocess.run(argv, stdin=read_end, capture_output=True, check=False, timeout=WATCHDOG_S)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert done.returncode == 0
    assert done.stdout.startswith(b"JULIET:")


@pytest.mark.spec("CLI-31", "CLI-4")
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the prompt is empty"),
        (b"\n", "the prompt is empty"),
        (b"ROMEO\xff", "standard input is not UTF-8: byte 5 has no meaning there"),
        (b"a" * 16_000_001, "standard input has more than 16.0 MB; no model reads a prompt of that length"),
        (b"a" * 15_999_999 + b"\xff", "standard input is not UTF-8: byte 15999999 has no meaning there"),
        ("é".encode(), "no token for the character 'é'"),
    ],
    ids=["nothing", "an empty line", "latin-1", "too long", "just short enough", "a character that the model lacks"],
)
def test_what_cannot_be_a_prompt_is_refused(data: bytes, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, data)
    assert why in refused("generate", "-")


@pytest.mark.spec("CLI-31", "CLI-4")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.txt", "missing.txt cannot be read: No such file or directory"),
        (".", " cannot be read: Is a directory"),
        ("/dev/zero", "/dev/zero has more than 16.0 MB"),
        ("a\0b", "cannot be read: embedded null byte"),
    ],
    ids=["missing", "a folder", "without an end", "no name"],
)
def test_a_file_that_is_no_prompt_is_refused(name: str, why: str, tmp_path: Path) -> None:
    path = name if "\0" in name else str(tmp_path / name)
    assert why in refused("generate", "--prompt-file", path)


@pytest.mark.spec("CLI-30", "CLI-4")
def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("generate", "-") == "refinfer: standard input is closed; give the prompt as an argument"


@pytest.mark.spec("CLI-30")
@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["a", "--token-ids", "1"], "a prompt and --token-ids were both given; give one of them"),
        (["-", "--prompt-file", "f"], "a prompt and --prompt-file were both given; give one of them"),
        (["--prompt-file", "f", "--token-ids", "1"], "--prompt-file and --token-ids were both given"),
        (["a", "--prompt-file", "f", "--token-ids", "1"], "a prompt and --prompt-file and --token-ids were all given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_two_prompts_are_refused(argv: list[str], why: str) -> None:
    assert why in refused("generate", *argv)


@pytest.mark.spec("CLI-30")
def test_only_the_storyteller_has_a_prompt_of_its_own(tmp_path: Path) -> None:
    run("synth", tmp_path / "m", "--shape", "tiny", "-q")
    why = "refinfer: there is no prompt: give a text to continue, or - to read it from standard input"
    assert refused("generate", "--model", tmp_path / "m") == why
    status, out, _ = run("generate", *SHORT)
    assert (status, out[:6]) == (0, "ROMEO:")
