"""What people see during and after a run: a progress bar, the outcome of the weight cache, and written files.

Leaves to others: tables (`table`), timelines (`simulate`).
Read more: tutorial 00; clauses CLI-1, CLI-10, CLI-24, CLI-36.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from refinfer.cli.terminal import native_code_unheard
from refinfer.errors import InputError
from refinfer.model.folder import ModelFolder, open_folder
from refinfer.units import format_nbytes
from refinfer.weight_cache.load_or_build import CacheOutcome, Listener
from refinfer.weight_cache.mapped_file import NO_FILE
from refinfer.weight_cache.ownership import require_replaceable, write_to_device
from refinfer.weight_cache.publish import Draft, write_small_file

__all__ = ["cache_line", "format_seconds", "listening", "open_model", "progress_bar", "require_writable", "write_file"]


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, nothing in a pipe or if it is quiet; yield the function that advances it."""
    if quiet or not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextlib.contextmanager
def listening(*, quiet: bool = False) -> Iterator[Listener]:
    """Yield a listener that shows the progress of packing unless it is quiet, and prints messages on standard error."""

    def tell(message: str) -> None:
        print(f"refinfer: {message}", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] | None = None
        title, total = "", 0

        def begin(what: str, nbytes: int) -> None:
            nonlocal advance, title, total
            stack.close()
            advance, title, total = None, what, nbytes

        def progress(nbytes: int) -> None:
            nonlocal advance
            if advance is None:  # nothing is shown unless there is something to wait for
                advance = stack.enter_context(progress_bar(title, total, quiet=quiet))
            advance(nbytes)

        yield Listener(
            begin=begin,
            progress=progress,
            on_wait=lambda: tell("waiting for another process that is packing the same weights"),
            on_long_wait=lambda draft: tell(f"still waiting: another process has {draft} locked"),
            warn=lambda message: tell(f"warning: {message}"),
        )


def open_model(name: str | os.PathLike[str]) -> ModelFolder:
    """Read the folder of a model, and print each of its warnings; what native code reports meanwhile is dropped."""
    with native_code_unheard():
        model = open_folder(name)
    with listening() as listener:
        for warning in model.warnings:
            listener.warn(warning)
    return model


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


def require_writable(path: str, begin: str) -> None:
    """Require that a text that begins with `begin` can be written to `path`, and that no other file is lost by it.

    Raises:
        InputError: there is no such folder, it may not be written to, or a file lies there that does not begin so.
    """
    try:
        obstacle = _obstacle(Path(os.path.realpath(path)))
    except OSError as error:
        obstacle = error.strerror
    if obstacle is not None:
        raise InputError(f"{path} cannot be written: {obstacle}")
    if os.path.isfile(path):  # noqa: PTH113  (false, and no error, for a name that no file can have)
        require_replaceable(Path(os.path.realpath(path)), begin.encode(), "what this command writes there")


def _obstacle(place: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        mode = place.stat().st_mode
        if stat.S_ISDIR(mode):
            return os.strerror(errno.EISDIR)
        if not stat.S_ISREG(mode):  # a device or a pipe
            return None
    place.parent.stat()
    return None if os.access(place.parent, os.W_OK) else os.strerror(errno.EACCES)


def write_file(path: str, begin: str, text: str) -> None:
    """Write a text to the file that was asked for, as a whole or not at all; `begin` is how such texts begin.

    Raises:
        InputError: the file cannot be written, or is not one of ours.
    """
    require_writable(path, begin)
    data = text.encode(errors="replace")
    try:
        found = Path(path).stat().st_mode if Path(path).exists() else stat.S_IFREG | 0o666
        if not stat.S_ISREG(found):  # a device or a pipe, such as /dev/stdout, which no other path may lead to
            write_to_device(Path(path), data)
            return
        place = Path(os.path.realpath(path))

        def prepare(draft: Draft) -> None:
            draft.make_readable_like([], stat.S_IMODE(found))
            draft.before = lambda: require_writable(path, begin)

        write_small_file(place, data, begin=begin.encode(), prepare=prepare)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
