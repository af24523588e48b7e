"""Comparisons that say what differs in the words of a lab: a row, a key, a chunk, a byte; never a wall of values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["require_equal", "require_error", "require_items", "require_near"]


def _shown(value: object, digits: int = 6) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.{digits}g}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_equal(found: object, expected: object, what: str) -> None:
    """Require that one value is right; `what` names it, such as `the offset of 'k_proj'`."""
    if found != expected:
        digits = 6 if _shown(found) != _shown(expected) else 17
        raise AssertionError(
            f"{what} is {_shown(found, digits)} in your code, and should be {_shown(expected, digits)}"
        )


def require_error(kind: type[Exception], why: str, work: Callable[[], object], what: str) -> None:
    """Require that some work is refused with an error that says `why`, a pattern; `what` names the work."""
    said = None
    try:
        work()
    except kind as error:
        said = str(error)
    assert said is not None, f"{what}, and no {kind.__name__} was raised"
    assert re.search(why, said), f"{what}: the {kind.__name__} does not say {why!r}: {said}"


def require_items(found: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    """Require that a list is right; names the first item that is not. `what` names an item, such as `chunk`."""
    for i, (ours, right) in enumerate(zip(found, expected, strict=False)):
        if ours != right:
            raise AssertionError(f"{what} {i} is {_shown(ours)} in your code, and should be {_shown(right)}")
    n = len(found)
    if n < len(expected):
        raise AssertionError(f"{what} {n} is missing in your code, and should be {_shown(expected[n])}")
    if n > len(expected):
        extra = found[len(expected)]
        raise AssertionError(f"{what} {len(expected)} is {_shown(extra)} in your code, and should not be there")


def require_near(
    found: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    what: str,
    axes: Sequence[str] = (),
    *,
    atol: float | npt.NDArray[Any] = 0.0,
    rtol: float = 0.0,
    filler: float | None = None,
    unwritten: str = "",
) -> None:
    """Require that every element of an array is right; names the first that is not, by the names of the axes.

    Args:
        found: what the code gave.
        expected: what is right.
        what: what the array is, such as `the output`.
        axes: a word for each axis, such as `("row", "column")`; by default they are only numbered.
        atol: how far an element may be off.
        rtol: the same, as a share of what is right.
        filler: what the memory held before. If all of it still holds that, nothing was written into it.
        unwritten: what to say then.
    """
    if np.shape(found) != np.shape(expected):
        raise AssertionError(
            f"{what} has the shape {list(np.shape(found))} in your code, not {list(np.shape(expected))}"
        )
    if filler is not None and found.size and np.array_equal(found, np.full_like(found, filler), equal_nan=True):
        raise AssertionError(unwritten or f"nothing was written: {what} still holds the {filler:g} it held before")
    bad = ~(np.abs(np.asarray(found, np.float64) - expected) <= atol + rtol * np.abs(expected))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        names = [*axes, *(f"axis {i}" for i in range(len(axes), len(at)))]
        place = ", ".join(f"{name} {i}" for name, i in zip(names, at, strict=True))
        digits = 6 if _shown(np.asarray(found)[at]) != _shown(np.asarray(expected)[at]) else 17
        value, right = _shown(np.asarray(found)[at], digits), _shown(np.asarray(expected)[at], digits)
        raise AssertionError(f"{what} at {place} is {value} in your code, and should be {right}")
