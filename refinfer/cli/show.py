"""What people see during and after a run: a progress bar, the outcome of the weight cache, and written files.

Leaves to others: tables (`table`), timelines (`simulate`).
Read more: tutorial 00; clauses CLI-1, CLI-10.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from refinfer.errors import InputError
from refinfer.units import format_nbytes
from refinfer.weight_cache.load_or_build import CacheOutcome, Listener
from refinfer.weight_cache.mapped_file import NO_FILE

__all__ = ["cache_line", "format_seconds", "listening", "progress_bar", "write_file"]


@contextlib.contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, nothing in a pipe; yield the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Yield a listener that shows the progress of packing, and prints messages on standard error."""

    def tell(message: str) -> None:
        print(f"refinfer: {message}", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        advance: list[Callable[[int], None]] = []

        def progress(nbytes: int) -> None:
            if not advance:  # nothing is shown unless there is something to wait for
                advance.append(stack.enter_context(progress_bar("packing the weights", None)))
            advance[0](nbytes)

        yield Listener(
            progress=progress,
            on_wait=lambda: tell("waiting for another process that is packing the same weights"),
            warn=lambda message: tell(f"warning: {message}"),
        )


def cache_line(outcome: CacheOutcome, *, mapped: bool = True) -> str:
    """Return what the weight cache did, and why; `mapped` is false within a budget, when files are only read."""
    hits = outcome.held_buffers - outcome.packed_buffers
    packed = f"packed {_buffers(outcome.packed_buffers)}, {format_nbytes(outcome.packed_bytes)}"
    took = format_seconds(outcome.load_or_build_s)
    if outcome.state == "off":
        line = "off: nothing was packed"
    elif outcome.state == "memory":
        line = f"{packed}, into memory in {took}" + (f": {outcome.reason}" if outcome.reason else "")
    elif outcome.state == "built":
        why = "" if outcome.reason == NO_FILE else f"rebuilt: {outcome.reason}; "
        kept = f", found {_buffers(hits)}" if hits else ""
        line = f"{why}{packed}{kept}, in {took}; the next start will {'map' if mapped else 'find'} them"
    else:
        saved = f"; packing took {format_seconds(outcome.packing_s)}" if outcome.packing_s is not None else ""
        found = f"{_buffers(hits)}, {format_nbytes(outcome.held_bytes)}"
        line = f"{'mapped' if mapped else 'found'} {found}, in {took}{saved}"
    return f"weight cache: {line}"


def _buffers(n: int) -> str:
    return f"{n} buffer{'s' if n != 1 else ''}"


def format_seconds(seconds: float) -> str:
    """Return a duration as people read it."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def write_file(path: str, text: str) -> None:
    """Write a text to the file that was asked for.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
