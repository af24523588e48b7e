"""What the tests of the explorables share."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
import explore_data as explore

ROOT: Final = Path(__file__).parents[2]


PAGES: Final = ROOT / "docs" / "explore"


SMALL: Final = "qwen2-0.5b"


@functools.cache
def committed(name: str) -> dict[str, Any]:
    """Return what a data file puts into the page."""
    text = (explore.DATA / f"{name}.js").read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text.partition(" = ")[2].rstrip().removesuffix(";"))
    return value


@functools.cache
def schedule(model: str) -> explore.Schedule:
    return explore.Schedule(model)


def entry_of(model: str, device: str, arm: str, number: int) -> explore.Outcome:
    """Return what the committed file says of one run."""
    data = committed(f"schedule-{model}")
    rate, ideal, waiting, account, grid, picture = data["runs"][device][arm][number]
    return explore.Outcome(
        rate, ideal, waiting, tuple(data["accounts"][account]), data["grids"][grid], data["pictures"][picture]
    )
