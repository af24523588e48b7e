"""The prompt of a run: an argument, standard input, a file, or one of our own.

A pipe is read only if it is asked for: under cron or ssh, standard input may be one that never ends.
Leaves to others: what a prompt is for (`generate`).
Read more: tutorial 00; clauses CLI-30, CLI-31.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import BinaryIO, Final

from refinfer.errors import InputError, RequestError
from refinfer.generate import DEFAULT_PROMPT
from refinfer.units import format_nbytes

__all__ = ["add_prompt", "prompt_of", "require_one_prompt"]

_MOST_BYTES: Final = 16_000_000  # some million tokens; /dev/zero never ends


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the prompt, and the option that names a file of it."""
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help=f"text to continue; - reads standard input (default for the storyteller: {DEFAULT_PROMPT!r})",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the prompt from a file or a pipe, without the line break at its end",
    )


def require_one_prompt(args: argparse.Namespace) -> None:
    """Require at most one prompt.

    Raises:
        RequestError: there are several.
    """
    given = {"a prompt": args.prompt, "--prompt-file": args.prompt_file, "--token-ids": args.token_ids}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        together = "both" if len(names) == 2 else "all"
        raise RequestError(f"{' and '.join(names)} were {together} given; give one of them")


def prompt_of(args: argparse.Namespace) -> str | None:
    """Return the text to continue, or None if it was given as token ids.

    Raises:
        InputError: no prompt was given for a user's own model, or it cannot be read, is not UTF-8, or is too long.
    """
    if args.token_ids is not None:
        return None
    if args.prompt_file is not None:
        try:
            with Path(args.prompt_file).open("rb") as file:
                return _text_of(file, args.prompt_file)
        except (OSError, ValueError) as error:  # a ValueError is about a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{args.prompt_file} cannot be read: {reason}") from None
    if args.prompt == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; give the prompt as an argument")
        return _text_of(sys.stdin.buffer, "standard input")
    if args.prompt is None and args.model is not None:
        raise RequestError("there is no prompt: give a text to continue, or - to read it from standard input")
    return DEFAULT_PROMPT if args.prompt is None else str(args.prompt)


def _text_of(file: BinaryIO, name: str) -> str:
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"{name} has more than {format_nbytes(_MOST_BYTES)}; no model reads a prompt of that length")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: byte {error.start} has no meaning there") from None
    return text.removesuffix("\n").removesuffix("\r")
