"""Turns what people write on the command line into values, and adds the options that several commands share.

Leaves to others: options of one command only (its own module), budgets (`offload.budget`).
Read more: tutorial 00; clause CLI-4.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from refinfer.cli.imported import imported
from refinfer.errors import RequestError
from refinfer.packing.formats import FORMATS
from refinfer.planning.cost import PREFETCH_THREADS
from refinfer.planning.own_plan import OwnPlan
from refinfer.planning.plan import MOST_PREFETCH_THREADS, PLANS
from refinfer.units import parse_integer, parse_nbytes, parse_number, shown

__all__ = [
    "MODEL",
    "add_json",
    "add_plan_choice",
    "add_prefetch",
    "add_quiet",
    "add_weights",
    "integer",
    "nbytes",
    "number",
    "plan",
    "rate",
    "seconds",
    "token_ids",
]

_LONGEST_S: Final = 86_400  # a day

MODEL: Final = "a model folder in Hugging Face's form, or the name of a downloaded model, such as org/name"
"""What may name a model, in help texts."""


def add_json(parser: argparse.ArgumentParser, text: str = "print one JSON object") -> None:
    """Add the option `--json`."""
    parser.add_argument("--json", action="store_true", help=text)


def add_quiet(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the option `--quiet`, or `-q`; warnings and errors are always printed."""
    parser.add_argument("-q", "--quiet", action="store_true", help=text)


def add_weights(parser: argparse.ArgumentParser, about_default: str, default: str | None = "auto") -> None:
    """Add the option `--weights`."""
    choices = ("auto", *FORMATS)
    text = f"weight format: {', '.join(choices)} (default: {about_default})"
    parser.add_argument("--weights", metavar="FORMAT", choices=choices, default=default, help=text)


def add_plan_choice(parser: argparse.ArgumentParser, about: str, default: str | None) -> None:
    """Add the option `--plan`."""
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        type=plan,
        default=default,
        help=f"{about}: {', '.join(PLANS)}, or package:function for one of your own (default: optimal)",
    )


def add_prefetch(parser: argparse.ArgumentParser, default: int | None) -> None:
    """Add the options that set how chunks are read ahead; `default` is the number of threads if none is given."""
    parser.add_argument(
        "--prefetch-threads",
        metavar="N",
        type=integer(0, MOST_PREFETCH_THREADS),
        default=default,
        help=f"number of prefetch threads; 0 reads each chunk on demand (default: {PREFETCH_THREADS})",
    )
    parser.add_argument(
        "--prefetch-ring",
        metavar="BYTES",
        type=nbytes,
        help="memory for chunks that were read ahead (default: chosen by the plan)",
    )


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a function that reads a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = parse_integer(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {shown(value)}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {shown(value)}")
        return value

    return parse


def plan(text: str) -> str | OwnPlan:
    """Read the name of a plan, or import the function that `package:function` names."""
    if ":" not in text:
        if text not in PLANS:
            choices = f"{', '.join(map(repr, PLANS))}, or package:function"
            raise argparse.ArgumentTypeError(f"invalid choice: {shown(text)} (choose from {choices})")
        return text
    try:
        function = imported(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not callable(function):
        raise argparse.ArgumentTypeError(f"{text} is {shown(function)}, not a function of an inventory and a room")
    return OwnPlan(text, function)


def number(text: str) -> float:
    """Read a number."""
    try:
        return parse_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """Read how long something may take: more than 0 seconds, and at most a day."""
    if not 0 < (value := number(text)) <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most {_LONGEST_S}, not {text}")
    return value


def token_ids(text: str) -> list[int]:
    """Read token ids such as `1,2,3`."""
    try:
        return [parse_integer(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of token ids such as 1,2,3") from None


def nbytes(text: str) -> int:
    """Read a size such as `300MB`."""
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rate(text: str) -> int:
    """Read a rate such as `300MB/s`, in bytes per second."""
    return nbytes(text.strip().removesuffix("/s"))
