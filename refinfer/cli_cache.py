"""The commands `pack` and `cache`: fill the weight cache beforehand, and look after the disk it takes.

Knows: how people name a cache file, tables. Does not know: how files are built or read.
Spec: CLI-10 to CLI-13. Tutorial: 06.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from refinfer.bench.report import print_table
from refinfer.errors import CacheFileError, InputError, WeightCacheError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.folder import open_folder, readable
from refinfer.offload.inventory import Inventory
from refinfer.packing.formats import FORMATS
from refinfer.prepare import IN_MEMORY, cache_path, choose_format, prepare
from refinfer.process import format_nbytes
from refinfer.trace import RealClock
from refinfer.weight_cache.directory import cache_directory, cache_files, describe, is_cache_file, remove
from refinfer.weight_cache.load_or_build import Listener, Prepared
from refinfer.weight_cache.mapped_file import MappedFile

__all__ = ["ACTIONS", "pack", "run_cache"]


def pack(folder: Path, weights: str, output: str | None, listener: Listener) -> Prepared:
    """Make sure that a model has its cache file; raises what `prepare` does."""
    if output == IN_MEMORY:
        raise InputError(f"pack makes a file, and {output} is none")
    model = open_folder(folder)
    with readable(folder):
        checkpoint = open_checkpoint(folder)
    inventory = Inventory(model.config, choose_format(checkpoint, weights))
    return prepare(inventory, checkpoint, output, clock=RealClock(), listener=listener)


def run_cache(args: argparse.Namespace) -> None:
    """Run `refinfer cache ACTION`."""
    ACTIONS[args.action](args)


def _targets(args: argparse.Namespace) -> list[Path]:
    """Return the cache files that the arguments name: files, names in the cache directory, or models.

    Raises:
        InputError: there is no such file, or it is not a cache file.
    """
    directory = cache_directory()
    if args.all or not args.target:
        if args.target:
            raise InputError("give either names or --all, not both")
        if not args.all and args.action != "list":
            raise InputError(f"say which: a cache file, a model folder, or --all (see refinfer cache {args.action} -h)")
        return list(cache_files(directory))
    return list(dict.fromkeys(path for target in args.target for path in _find(target, directory, args.weights)))


def _find(target: str, directory: Path, weights: str | None) -> Iterator[Path]:
    path = Path(target)
    with readable(path):
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "name"
    named = directory / target
    if kind == "folder":
        found = [file for file in _of_model(path, weights) if file.exists()]
        if not found:
            raise InputError(f"{target} has no cache file yet; refinfer pack makes one")
        yield from found
    elif kind == "file":
        if not is_cache_file(path) and path.resolve() not in {file.resolve() for file in cache_files(directory)}:
            raise InputError(f"{target} is not a refinfer weight cache")
        yield path
    elif named in cache_files(directory):
        yield named
    else:
        raise InputError(f"there is no cache file or model {target}; refinfer cache list shows what there is")


def _of_model(folder: Path, weights: str | None) -> list[Path]:
    with readable(folder):
        checkpoint = open_checkpoint(folder)
    names = [choose_format(checkpoint, weights)] if weights else list(FORMATS)
    return [cache_path(checkpoint, name, None) for name in names]


def _list(args: argparse.Namespace) -> None:
    rows = [describe(path) for path in _targets(args)]
    if args.json:
        print(json.dumps({"directory": str(cache_directory()), "files": rows}))
        return
    if not rows:
        print(f"no cache files in {cache_directory()}")
        return
    print_table(
        f"Weight caches in {cache_directory()}",
        ["file", "model", "format", "size", "state"],
        [
            [
                Path(row["path"]).name,
                row["model"] or "",
                row["format"] or "",
                format_nbytes(row["bytes"]),
                row["reason"] or "good",
            ]
            for row in rows
        ],
    )
    print(f"{format_nbytes(sum(row['bytes'] for row in rows))} in all")


def _info(args: argparse.Namespace) -> None:
    rows = [describe(path) for path in _targets(args)]
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print_table(Path(row["path"]).name, ["what", "value"], list(_facts(row)))


def _facts(row: dict[str, Any]) -> Iterator[list[str]]:
    yield ["path", row["path"]]
    yield ["size", format_nbytes(row["bytes"])]
    yield ["state", row["reason"] or "good"]
    if row["model"] is None:
        return
    yield ["model", row["model"]]
    yield ["format", row["format"]]
    yield ["buffers", f"{row['buffers']} in {row['chunks']} chunks, {format_nbytes(row['packed_bytes'])}"]
    yield ["format version", str(row["format_version"])]
    yield ["packer fingerprint", row["packers"][:16]]
    yield ["model identity", row["model_digest"][:16]]
    if row["packing_s"] is not None:
        yield ["packing took", f"{row['packing_s']:.3f} s"]
    for source in row["sources"]:
        yield [f"source {source['name']}", f"{format_nbytes(source['bytes'])}, SHA-256 {source['sha256'][:16]}"]


def _verify(args: argparse.Namespace) -> None:
    rows = []
    for path in _targets(args):
        try:
            problems = list(MappedFile(path).problems())
        except CacheFileError as error:
            problems = [error.reason]
        rows.append({"path": str(path), "problems": problems})
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(f"{row['path']}: {'; '.join(row['problems']) or 'good'}")
    if damaged := sum(bool(row["problems"]) for row in rows):
        sys.stdout.flush()
        raise WeightCacheError(f"{damaged} of {len(rows)} cache files are damaged; the next start rebuilds them")


def _rm(args: argparse.Namespace) -> None:
    freed = {str(path): remove(path) for path in _targets(args)}
    if args.json:
        print(json.dumps([{"path": path, "bytes": nbytes} for path, nbytes in freed.items()]))
        return
    for path, nbytes in freed.items():
        print(f"removed {path}, {format_nbytes(nbytes)}")


def _path(args: argparse.Namespace) -> None:
    """Print the cache directory, or where the cache files of models lie, whether they exist or not."""
    targets: Sequence[str] = args.target
    paths = [path for target in targets for path in _path_of(target, args.weights)] or [cache_directory()]
    print(json.dumps([str(path) for path in paths]) if args.json else "\n".join(map(str, paths)))


def _path_of(target: str, weights: str | None) -> list[Path]:
    folder = Path(target)
    with readable(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        raise InputError(f"there is no model folder {target}")
    return _of_model(folder, weights or "auto")


ACTIONS: Final = {"list": _list, "info": _info, "verify": _verify, "rm": _rm, "path": _path}
"""What can be done with the cache directory."""
