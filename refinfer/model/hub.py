"""Finds a model by its name on the Hugging Face Hub, `org/name`, in the cache of what was downloaded before.

Reads folders and one small file; it never uses the network. Leaves to others: downloading (`hf download`), what is in a
model folder.
Read more: tutorial 00; clauses HUB-1 to HUB-3.

    hub/models--org--name/refs/main                 the revision that was downloaded last
    hub/models--org--name/snapshots/REVISION/...    the model folder; its files are links into
    hub/models--org--name/blobs/...
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from refinfer.errors import ConfigError
from refinfer.whole_file import read_whole

__all__ = ["called", "download_command", "find_model", "hub_cache", "repository_of"]

_PART: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*"
_REPOSITORY: Final = re.compile(rf"{_PART}(?:/{_PART})?")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_LONGEST_NAME: Final = 96
_LARGEST_REFERENCE_BYTES: Final = 1000


def hub_cache() -> Path:
    """Return the folder of downloaded models, as `huggingface_hub` finds it."""

    def given(name: str, default: str) -> str:
        return os.environ.get(name) or default

    home = given("HF_HOME", os.path.join(given("XDG_CACHE_HOME", "~/.cache"), "huggingface"))  # noqa: PTH118
    cache = given("HF_HUB_CACHE", given("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))  # noqa: PTH118
    return Path(os.path.expandvars(os.path.expanduser(cache)))  # noqa: PTH111


def find_model(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: the folder of that name, or else what was downloaded from the Hub under that name.

    What is neither is returned as it is, unless it looks like `org/name`: the reader of the folder says what is wrong.

    Raises:
        ConfigError: a name such as `org/name` is neither a folder nor in the cache, or only a part of it is there.
    """
    name, folder = os.fspath(model), Path(model)
    if os.path.isdir(name) or len(name) > _LONGEST_NAME or not _REPOSITORY.fullmatch(name):  # noqa: PTH112
        return folder
    cache = hub_cache()
    repository = cache / f"models--{name.replace('/', '--')}"
    if not os.path.isdir(repository):  # noqa: PTH112
        if "/" not in name or os.path.lexists(name):
            return folder
        raise ConfigError(
            f"{name} is neither a folder nor a model in the Hugging Face cache {cache}; "
            f"download it with {download_command(name)}"
        )
    snapshot = _snapshot(repository)
    if snapshot is None:
        raise ConfigError(
            f"{repository} has only a part of {name}: refs/main leads to no snapshot; "
            f"complete it with {download_command(name)}"
        )
    return snapshot


def _snapshot(repository: Path) -> Path | None:
    """Return the folder that `refs/main` leads to, or None if there is no such folder."""
    try:
        revision = read_whole(repository / "refs" / "main", _LARGEST_REFERENCE_BYTES).decode().strip()
    except (OSError, ValueError):
        return None
    # A plain name only: a reference must not be able to point outside its folder.
    snapshot = repository / "snapshots" / revision if _REVISION.fullmatch(revision) else None
    return snapshot if snapshot and os.path.isdir(snapshot) else None  # noqa: PTH112


def repository_of(folder: Path) -> str | None:
    """Return the name on the Hub of a model folder in its cache, or None for any other folder.

    Examples:
        >>> repository_of(Path("/hub/models--org--name/snapshots/0123abcd"))
        'org/name'
    """
    *_, repository, snapshots, _ = ("", "", "", *folder.parts)
    name = repository.removeprefix("models--").replace("--", "/", 1)
    is_one = snapshots == "snapshots" and repository.startswith("models--") and _REPOSITORY.fullmatch(name)
    return name if is_one else None


def called(folder: Path) -> str:
    """Return what people call a model folder: its name on the Hub, or else the folder's own name."""
    folder = folder.resolve()
    return repository_of(folder) or folder.name


def download_command(name: str) -> str:
    """Return the command that downloads a model, or what is missing of it."""
    return f"hf download {name}"
