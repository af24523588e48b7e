"""Lines that fit a terminal: how wide it is, and where lines are broken."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.cli.terminal import columns_of, hanging, native_code_unheard, say, say_terms, terms, words_of, wrap

sys.path.insert(0, str(Path(__file__).parent))
from command_line import on_terminal

WORDS = st.lists(st.text("ab/-1你", min_size=1, max_size=12), max_size=12)


def width(text: str) -> int:
    return sum(2 if letter == "你" else 1 for letter in text)


@pytest.mark.spec("CLI-20")
@pytest.mark.parametrize(
    ("given_columns", "columns"),
    [
        ("80", 80),
        ("9999", 9999),
        ("0", None),
        ("", None),
        ("-5", None),
        ("wide", None),
        ("8²", None),
        ("9" * 5000, None),
    ],
)
def test_columns_come_from_the_environment_if_its_value_is_valid(
    given_columns: str, columns: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", given_columns)
    assert columns_of(io.StringIO()) == columns


@pytest.mark.spec("CLI-20")
@pytest.mark.parametrize(("real", "columns"), [(97, 97), (0, 80)])
def test_columns_are_otherwise_those_of_the_terminal(real: int, columns: int) -> None:
    seen: list[int | None] = []
    on_terminal(lambda: seen.extend([columns_of(sys.stdout), columns_of(sys.stderr)]), real)
    assert seen == [columns, columns]


@pytest.mark.spec("CLI-20")
def test_a_pipe_has_no_columns_and_lines_in_it_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert columns_of(io.StringIO()) is None
    line = "word " * 99 + "end"
    say(line)
    assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.spec("CLI-20")
@given(words=WORDS, columns=st.integers(4, 40), first=st.sampled_from(["", "- ", "key  "]))
def test_lines_fit_and_words_stay_whole_and_in_order(words: list[str], columns: int, first: str) -> None:
    lines = wrap(words, columns, first, " " * len(first))
    assert " ".join(lines).split() == [*first.split(), *words]
    for line in lines:
        assert width(line) <= max(columns, len(first)) or len(line.split()) == 1


@pytest.mark.spec("CLI-20")
def test_a_word_that_is_too_long_begins_further_to_the_left() -> None:
    assert wrap(["one", "two"], 7) == ["one two"]  # which is just as long as the line
    assert wrap(["a" * 30], 40, "a long key  ", " " * 12) == ["a long key", "    " + "a" * 30]
    assert wrap(["a" * 50], 40, "a long key  ", " " * 12) == ["a long key", "    " + "a" * 50]
    assert wrap(["a" * 39], 40, "a long key  ", " " * 12) == ["a long key", " " + "a" * 39]
    assert wrap(["a" * 40], 40, "a long key  ", " " * 12) == ["a long key", "a" * 40]
    assert wrap(["a" * 39, "b"], 40, "  ", "  ") == [" " + "a" * 39, "  b"]  # no line of blanks before it


@pytest.mark.spec("CLI-20")
def test_a_number_stays_with_its_unit() -> None:
    assert words_of("packed 44 buffers,  4.8 MB") == ["packed", "44 buffers,", "4.8 MB"]


@pytest.mark.spec("CLI-20")
def test_a_sequence_is_broken_between_its_elements_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    say(["removed", "a name with blanks,", "4.8 MB"])
    assert capsys.readouterr().out == "removed\n a name with blanks,\n  4.8 MB\n"


@pytest.mark.spec("CLI-20")
def test_what_a_term_means_is_indented_under_its_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = {"mmap": "a page cache of the same size", "a b": "c"}
    assert terms(explained) == ["mmap  a page cache of the same size", "a b   c"]
    assert hanging("no term here, only one line", 12) == ["no term", "here, only", "one line"]
    monkeypatch.setenv("COLUMNS", "24")
    say_terms(explained)
    assert capsys.readouterr().out == "mmap  a page cache of\n      the same size\na b   c\n"


@pytest.mark.spec("ERR-2")
def test_what_native_code_reports_is_dropped_and_standard_error_is_there_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        with native_code_unheard():
            os.write(2, b"thread panicked")
            raise ValueError("its error")

    def free_descriptors() -> list[int]:
        found = [os.dup(2) for _ in range(3)]
        for descriptor in found:
            os.close(descriptor)
        return found

    before = free_descriptors()
    with pytest.raises(ValueError, match="its error"):
        fail()
    assert free_descriptors() == before  # nothing stays open
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"
