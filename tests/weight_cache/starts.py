"""What a folder may hold before a build: nothing, an old file, or what a crash has left of one."""

from __future__ import annotations

from pathlib import Path

from build_site import Site, come_to_rest, put, taken
from refinfer.weight_cache.identity import side_path
from refinfer.weight_cache.publish import draft_path

NOTHING, OLD_FILE, DEAD_DRAFT, LOST_FILE = "no file", "an old file", "a dead draft", "a lost file"
BEGINNINGS = [NOTHING, OLD_FILE, DEAD_DRAFT]


def make_small(folder: Path) -> Site:
    """Return a site with a cache file of few pages."""
    return Site.make(folder, (48, 40), ("a", "table", "norm"))


def before(what: str, site: Site) -> dict[str, bytes]:
    """Return the files of a cache folder before a build that begins with `what`."""
    folder = site.cache.parent
    put(folder, {})
    if what == OLD_FILE:  # of another model, with a side file of its own
        site.with_model(1).open()
    elif what == DEAD_DRAFT:  # whole, and longer than the new one will be
        site.with_model(1).open()
        site.cache.rename(draft_path(site.cache))
        side_path(site.cache).unlink()
        with draft_path(site.cache).open("ab") as file:
            file.write(bytes(range(256)) * 64)
    elif what == LOST_FILE:  # the side file is still there, and true
        come_to_rest(site.source)
        site.open()
        site.cache.unlink()
    return taken(folder)
