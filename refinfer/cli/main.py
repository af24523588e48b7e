"""The command line: one command in, an exit status out, one clear line when something is wrong.

Keeps the table of commands, exit statuses, the standard streams and the form of help. Leaves to others: the options of
a command and what it does (only the module of the command that is named is imported), signals (`ending`).
Read more: tutorial 00; clauses CLI-3, CLI-4, CLI-8, CLI-20, CLI-23, CLI-34, CLI-35.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

from refinfer import __version__
from refinfer.cli.terminal import hanging, words_of, wrap
from refinfer.errors import InputError, RefinferError
from refinfer.units import shortened

__all__ = ["COMMANDS", "Parser", "main", "make_parser"]

COMMANDS: Final = {
    "generate": ("generate", "Continue a prompt."),
    "synth": ("synth", "Write a checkpoint with random weights, in Hugging Face's form."),
    "pack": ("cache", "Pack a model's weights into its cache file, if they are not there yet."),
    "cache": ("cache", "List, describe, verify or remove cache files."),
    "plan": ("plan", "Show how each of the seven plans would spend a memory budget; no weights are needed."),
    "simulate": ("simulate", "Simulate a run within a memory budget on a virtual clock; no weights are needed."),
    "doctor": ("machine", "Describe this machine and what it can do."),
    "lab": ("lab", "Learn by rewriting the heart of this package, one function at a time."),
    "bench": ("machine", "Measure in interleaved rounds, and print medians."),
}
"""Each command: the module in this room whose function `add_COMMAND` adds its options, and a line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a failure while running, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    _mend_streams()
    try:
        if not argv:
            make_parser(argv).print_help()
            return 0
        args = make_parser(argv).parse_args(argv)
        run: Callable[[argparse.Namespace], int | None] = args.run
        status = run(args)
        sys.stdout.flush()
    except RefinferError as error:
        return _complain(str(error), error.exit_status)
    except BrokenPipeError:  # whoever read the output has seen enough
        return 1
    except MemoryError:
        return _complain("there is not enough memory for this; use a smaller model or fewer tokens", 1)
    except OSError as error:
        return _complain(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    return status or 0


def _mend_streams() -> None:
    """Make the standard streams usable: output to closed ones is dropped, and unknown characters become '?'."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  (open until the program ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


_LONGEST_LINE: Final = 1500  # argparse repeats a wrong argument whole; a command to copy has long paths in it


def _complain(message: str, status: int) -> int:
    one_line = shortened(re.sub(r"\s+", " ", message), _LONGEST_LINE)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"refinfer: {one_line}\n")
    return status


_DASHED: Final = re.compile(r"unrecognized arguments:(?s:.*) -|ignored explicit argument")


class _Help(argparse.HelpFormatter):
    """Help in which no name is broken, not even at a hyphen."""

    def add_argument(self, action: argparse.Action) -> None:
        """Make room for the longest name of a command too."""
        super().add_argument(action)
        for command in self._iter_indented_subactions(action):
            length = len(self._format_action_invocation(command)) + self._current_indent
            self._action_max_length = max(self._action_max_length, length)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(words_of(text), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for part in text.splitlines() for line in hanging(part, width - len(indent)))


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line, and names the help of its own command."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  (those of argparse)
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments, all of which must be known.

        Raises:
            InputError: an argument is unknown or wrong.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Refuse an argument.

        Raises:
            InputError: always.
        """
        dashed = _DASHED.search(message) and self._get_positional_actions() and not self._subparsers
        hint = "; an argument that begins with a dash, such as a prompt, goes last, after --" if dashed else ""
        raise InputError(f"{message}{hint} (see {self.prog} --help)")


def make_parser(argv: Sequence[str]) -> Parser:
    """Return the parser of all commands; only the command that `argv` names has its options."""
    parser = Parser(
        prog="refinfer",
        description="Weight caches and weight offloading for language models, in readable numpy.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"refinfer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == named:
            getattr(import_module(f"refinfer.cli.{module}"), f"add_{name}")(command)
    return parser
