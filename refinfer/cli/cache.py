"""The commands `pack` and `cache`: write cache files in advance, and list, describe, verify or remove them.

Finds the cache files that arguments name. Leaves to others: building and reading files, tables (`table`).
Read more: tutorial 06; clauses CLI-10 to CLI-13.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from refinfer.cli.options import MODEL, add_json, add_quiet, add_weights
from refinfer.cli.show import cache_line, listening, open_model
from refinfer.cli.table import Cell, print_table
from refinfer.cli.terminal import say, words_of
from refinfer.clock import RealClock
from refinfer.errors import CacheFileError, InputError, WeightCacheError
from refinfer.generate import STORYTELLER
from refinfer.inventory import Inventory
from refinfer.model.folder import open_weights, readable
from refinfer.model.hub import find_model, repository_of
from refinfer.packing.formats import FORMATS
from refinfer.prepare import IN_MEMORY, cache_path, choose_format, prepare
from refinfer.units import format_nbytes
from refinfer.weight_cache.directory import cache_directory, cache_files, describe, is_cache_file, remove
from refinfer.weight_cache.mapped_file import MappedFile

__all__ = ["ACTIONS", "add_cache", "add_pack", "run_cache", "run_pack"]


def add_pack(parser: argparse.ArgumentParser) -> None:
    """Add the options of `refinfer pack`."""
    parser.set_defaults(run=run_pack)
    parser.add_argument(
        "folder",
        metavar="MODEL",
        nargs="?",
        default=STORYTELLER,
        help=f"{MODEL} (default: the storyteller)",
    )
    add_weights(parser, "auto, which is bf16 for bfloat16 checkpoints and f32 for others")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file to write (default: one in the user's cache directory)"
    )
    add_json(parser)
    add_quiet(parser, "print the file's name alone, without a summary and without a progress bar")


def run_pack(args: argparse.Namespace) -> None:
    """Run `refinfer pack`."""
    if args.output == IN_MEMORY:
        raise InputError(f"--output {IN_MEMORY} is not a file; give a file name")
    model = open_model(args.folder)
    checkpoint = model.checkpoint()
    inventory = Inventory(model.config, choose_format(checkpoint, args.weights))
    with listening(quiet=args.quiet) as listener:
        outcome = prepare(inventory, checkpoint, args.output, clock=RealClock(), listener=listener).outcome
    if args.json:
        print(json.dumps(asdict(outcome)))
    else:
        print(outcome.path)
        sys.stdout.flush()
        if not args.quiet:
            say(cache_line(outcome), sys.stderr)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `refinfer cache`, each with its options."""
    parser.set_defaults(run=run_cache)
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    for name, (_, text) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "target",
            metavar="FILE|MODEL",
            nargs="*",
            help=f"a cache file, its name in the cache directory, or {MODEL}",
        )
        add_weights(action, "auto for cache path, every format for the other actions", default=None)
        action.add_argument("--all", action="store_true", help="take all files in the cache directory")
        add_json(action, "print JSON")


def run_cache(args: argparse.Namespace) -> None:
    """Run `refinfer cache ACTION`."""
    run, _ = ACTIONS[args.action]
    run(args)


def _targets(args: argparse.Namespace) -> list[Path]:
    """Return the cache files that the arguments name: files, names in the cache directory, or models.

    Raises:
        InputError: there is no such file, or it is not a cache file.
    """
    directory = cache_directory()
    if args.all or not args.target:
        if args.target:
            raise InputError("names and --all were both given; give one of them")
        if not args.all and args.action != "list":
            raise InputError(
                "nothing was named; give a cache file, a model folder or --all "
                f"(see refinfer cache {args.action} --help)"
            )
        return list(cache_files(directory))
    return list(dict.fromkeys(path for target in args.target for path in _find(target, directory, args.weights)))


def _find(target: str, directory: Path, weights: str | None) -> Iterator[Path]:
    path = Path(target)
    with readable(path):
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "name"
    named = directory / target
    if kind == "folder" or (kind == "name" and named not in cache_files(directory) and _is_downloaded(target)):
        found = [file for file in _of_model(target, weights) if file.exists()]
        if not found:
            raise InputError(f"{target} has no cache file yet; write one with refinfer pack")
        yield from found
    elif kind == "file":
        here = Path(os.path.realpath(path.parent)) / path.name
        if here in cache_files(Path(os.path.realpath(directory))):
            yield path  # whatever it leads to
        elif is_cache_file(path):
            yield Path(os.path.realpath(path))
        else:
            raise InputError(f"{target} is not a refinfer weight cache")
    elif named in cache_files(directory):
        yield named
    else:
        raise InputError(f"{target} is neither a cache file nor a model; list the files with refinfer cache list")


def _is_downloaded(model: str) -> bool:
    """Return whether this is the name of a model in the Hugging Face cache.

    Raises:
        ConfigError: it looks like the name of one, but is not there, or only in part.
    """
    return find_model(model) != Path(model)


def _of_model(model: str, weights: str | None) -> list[Path]:
    checkpoint = open_weights(model)
    names = [choose_format(checkpoint, weights)] if weights else list(FORMATS)
    return [cache_path(checkpoint, name, None) for name in names]


def _described(path: Path) -> dict[str, Any]:
    """Return what there is to say about a cache file, with the model's name on the Hugging Face Hub, if it has one."""
    row = describe(path)
    return row | {"repository": repository_of(Path(row["model"])) if row["model"] else None}


def _list(args: argparse.Namespace) -> None:
    rows = list(map(_described, _targets(args)))
    if args.json:
        print(json.dumps({"directory": str(cache_directory()), "files": rows}))
        return
    if not rows:
        say(["no cache files in", str(cache_directory())])
        return
    print_table(
        ["Weight caches in", str(cache_directory())],
        ["file", "model", "format", "size", "state"],
        [
            [
                Path(row["path"]).name,
                row["repository"] or (Path(row["model"]) if row["model"] else ""),
                row["format"] or "",
                format_nbytes(row["bytes"]),
                row["reason"] or "good",
            ]
            for row in rows
        ],
        keys=0,
        prose=("model", "state"),
    )
    print(f"{format_nbytes(sum(row['bytes'] for row in rows))} in all")


def _info(args: argparse.Namespace) -> None:
    rows = list(map(_described, _targets(args)))
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print_table([Path(row["path"]).name], ["what", "value"], list(_facts(row)), keys=0, prose=["value"])


def _facts(row: dict[str, Any]) -> Iterator[list[Cell]]:
    yield ["path", Path(row["path"])]
    yield ["size", format_nbytes(row["bytes"])]
    yield ["state", row["reason"] or "good"]
    if row["model"] is None:
        return
    yield ["model", Path(row["model"])]
    if row["repository"] is not None:
        yield ["name on the Hugging Face Hub", row["repository"]]
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
            say([f"{row['path']}:", *words_of("; ".join(row["problems"]) or "good")])
    if damaged := sum(bool(row["problems"]) for row in rows):
        sys.stdout.flush()
        raise WeightCacheError(f"{damaged} of {len(rows)} cache files are damaged; the next start rebuilds them")


def _rm(args: argparse.Namespace) -> None:
    freed = {str(path): remove(path) for path in _targets(args)}
    if args.json:
        print(json.dumps([{"path": path, "bytes": nbytes} for path, nbytes in freed.items()]))
        return
    for path, nbytes in freed.items():
        say(["removed", f"{path},", format_nbytes(nbytes)])


def _path(args: argparse.Namespace) -> None:
    """Print the cache directory, or where the cache files of models lie, whether they exist or not."""
    targets: Sequence[str] = args.target
    paths = [path for target in targets for path in _path_of(target, args.weights)] or [cache_directory()]
    print(json.dumps([str(path) for path in paths]) if args.json else "\n".join(map(str, paths)))


def _path_of(target: str, weights: str | None) -> list[Path]:
    folder = find_model(target)
    with readable(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        raise InputError(f"{target} is not a model folder")
    return _of_model(target, weights or "auto")


ACTIONS: Final[dict[str, tuple[Callable[[argparse.Namespace], None], str]]] = {
    "list": (_list, "Show all cache files, or those of some models."),
    "info": (_info, "Show what is in cache files."),
    "verify": (_verify, "Read cache files whole and check every byte."),
    "rm": (_rm, "Remove cache files."),
    "path": (_path, "Print the cache directory, or where a model's file lies."),
}
"""The actions on cache files, each with a line of help."""
