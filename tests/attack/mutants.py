"""Try mutants: change one small thing in a module, run the tests that mirror the module, and see whether they notice.

For each module a seeded sample is drawn. The checkout is never changed: the tests run in a cage, in which the import
system is given the mutated source. Results go to a file, line by line, so a run that was broken off is continued by the
same command; so is one with a larger sample, or after tests were added.

    python tests/attack/mutants.py --results mutants.jsonl                           # overnight: 30 for each module
    python tests/attack/mutants.py --results some.jsonl --modules 'packing/*' --sample 5

Leaves to others: what is changed (`mutations`), the order of the tests (`reach`), limits and the guard of the file
system (`cage`).
Read more: docs/mutants.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from math import ceil
from multiprocessing.pool import Pool
from pathlib import Path
from random import Random
from typing import Any, Final

from cage import ESCAPED, Ran, caged
from mutations import Mutant, draw
from reach import Order, Reach, Recorder
from replaced import replace_source

ROOT: Final = Path(__file__).parents[2]
PRELOADED: Final = (
    "numpy",
    "pytest",
    "hypothesis.stateful",
    "threadpoolctl",
    "rich.table",
    "rich.progress",
    "tokenizers",
)
"""Imported once; each mutant's process begins as a copy."""

MEMORY: Final = 4 << 30
"""The address space that tests may take, in bytes."""

ELSEWHERE: Final = (Path("/dev/shm"), Path("/sys/fs/cgroup"))
"""Where tests may write, too: some build hundreds of files in memory, some limit a group of processes."""

NO_TESTS: Final = 5
"""What pytest ends with if every test is left out."""

SHARED: Final = {
    "__init__": ["test_front_door"],
    "__main__": ["cli/test_cli_main", "cli/test_cli_ending"],
    "bench/calibrate": ["offload/test_calibration", "test_json_names"],
    "bench/entry": ["bench/test_*"],
    "bench/machine": ["bench/test_bench_abilities", "cli/test_cli_machine"],
    "bench/naive": ["bench/test_bench_decode"],
    "bench/offload": ["cli/test_cli_machine"],
    "cli/lab": ["labs/test_labs_workspace"],
    "labs/*": ["labs/test_labs_*", "cli/test_cli_lab"],
    "cli/[cgmps]*": ["cli/test_cli_main"],
    "cli/cache": ["wild/test_wild_habits", "wild/test_wild_hub"],
    "cli/generate": ["wild/test_wild_sampling"],
    "cli/main": ["wild/test_wild_habits", "cli/test_cli_columns"],
    "cli/synth": ["wild/test_wild_habits"],
    "cli/terminal": ["cli/test_cli_columns"],
    "clock": ["wild/test_wild_chat"],
    "cli/options": ["cli/test_cli_main", "cli/test_cli_generate", "cli/test_cli_plan*", "wild/test_wild_prototypes"],
    "cli/pictures": ["test_trace", "planning/test_report"],
    "cli/plan": ["cli/test_cli_planning"],
    "cli/simulate": ["cli/test_cli_planning"],
    "model/checkpoint": ["wild/test_wild_checkpoints", "test_prepare"],
    "model/config_keys": ["model/test_config_json", "wild/test_wild_config", "wild/test_wild_checkpoints"],
    "model/hub": ["wild/test_wild_hub"],
    "model/other_forms": [
        "wild/test_wild_checkpoints",
        "wild/test_wild_hub",
        "model/test_config_json",
        "model/test_checkpoint",
    ],
    "model/weights": ["wild/test_wild_checkpoints"],
    "model/tokenizer_config": ["model/test_tokenizer", "wild/test_wild_chat"],
    "model/tokenizer": ["wild/test_wild_text"],
    "cli/prompt": ["wild/test_wild_prompts"],
    "cli/show": ["cli/test_cli_generate", "cli/test_cli_plan*"],
    "engine": ["engine/test_*", "test_generate", "offload/test_prefetch_trace", "sources/test_own_source"],
    "generate": ["engine/test_damage", "sources/test_own_source"],
    "errors": ["test_front_door", "cli/test_cli_main"],
    "model/generation_config": ["wild/test_wild_sampling"],
    "model/folder": [
        "test_generate",
        "test_prepare",
        "wild/test_wild_chat",
        "wild/test_wild_numbers",
        "wild/test_wild_checkpoints",
    ],
    "offload/store": ["offload/test_readers"],
    "offload/streamed": ["sources/test_any_source", "engine/test_users"],
    "packing/layout": ["packing/test_formats"],
    "packing/[bfi]*": ["packing/test_formats", "packing/test_matmul", "planning/test_cost"],
    "sources/*": ["sources/test_*"],
    "weight_cache/file": ["weight_cache/test_provider"],
    "weight_cache/identity": ["weight_cache/test_side_file"],
    "weight_cache/load_or_build": ["weight_cache/test_ownership", "weight_cache/test_publish", "test_prepare"],
    "weight_cache/memory": ["weight_cache/test_provider"],
    "weight_cache/publish": ["weight_cache/test_ownership", "weight_cache/test_load_or_build_trouble"],
}
"""Tests that several modules share, or that have another name than their module."""


@dataclass(frozen=True)
class Module:
    """A module of a checkout."""

    root: Path
    path: Path

    @property
    def name(self) -> str:
        """Its path inside the package, without the ending."""
        return self.path.relative_to(self.root / "refinfer").with_suffix("").as_posix()

    @property
    def dotted(self) -> str:
        """The name under which it is imported."""
        return ".".join(["refinfer", *self.name.split("/")]).removesuffix(".__init__")

    @property
    def mirror(self) -> str:
        """The test file that it should have, inside the folder of tests."""
        *room, name = self.name.split("/")
        return "/".join([*room, f"test_{name}.py"])

    @property
    def tests(self) -> list[Path]:
        """The test files that mirror it: first its own, then those it shares."""
        *room, name = self.name.split("/")
        files = ["/".join([*room, f"test_{own}"]) for own in (name, "_".join([*room, name]))]
        patterns = files + [f"{file}_*" for file in files]
        patterns += [file for key, more in SHARED.items() if fnmatch(self.name, key) for file in more]
        found = (path for pattern in patterns for path in sorted((self.root / "tests").glob(f"{pattern}.py")))
        return list(dict.fromkeys(found))


_CUSTOMISED: Final = """
import pathlib, sys
sys.path.append({here!r})
import cage, replaced
sys.addaudithook(cage.guard(*map(pathlib.Path, {folders!r})))
replaced.replace_source({name!r}, {path!r}, {source!r})
"""
"""What the programs that tests start do first."""


def run_tests(module: Module, source: str, seconds: float, *plugins: object) -> Ran:
    """Run the tests that mirror a module in a cage, where the module has that source; stop at the first failure."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        here, folders = str(Path(__file__).parent), [folder, *map(str, ELSEWHERE)]
        replaced = {"name": module.dotted, "path": str(module.path), "source": source}
        Path(folder).chmod(0o755)  # some tests continue as another user
        (Path(folder) / "tmp").mkdir()
        (Path(folder) / "sitecustomize.py").write_text(_CUSTOMISED.format(here=here, folders=folders, **replaced))

        def work() -> int:
            os.environ |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HYPOTHESIS_STORAGE_DIRECTORY"), f"{folder}/home")
            os.environ["TMPDIR"] = f"{folder}/tmp"
            os.environ |= {"PYTHONPATH": f"{folder}:{module.root}", "PYTHONDONTWRITEBYTECODE": "1"}
            sys.dont_write_bytecode = True
            sys.path[:0] = [folder, str(module.root)]  # some tests give their own path to the programs they start
            tempfile.tempdir = f"{folder}/tmp"
            os.chdir(tempfile.tempdir)
            replace_source(**replaced)
            options = ["-x", "-q", "-rfE", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
            where = ["-c", str(module.root / "pyproject.toml"), f"--basetemp={folder}/tests"]
            return int(importlib.import_module("pytest").main([*options, *where, *map(str, module.tests)], plugins))

        return caged(Path(folder), work, memory=MEMORY, seconds=ceil(seconds), elsewhere=ELSEWHERE)


def record(module: Module) -> tuple[Ran, Reach]:
    """Run the tests without a mutant; return how they ended, and what each of them reaches, as far as that is known."""
    with tempfile.TemporaryFile("w+") as file:  # the cage inherits it
        ran = run_tests(module, module.path.read_text(), 900, Recorder(module.path, file))
        if ran.status:  # some tests fail if they are watched, which takes time and memory
            ran = run_tests(module, module.path.read_text(), 900)
        file.seek(0)
        return ran, json.loads(file.read() or "{}")


def outcome(task: tuple[Module, Mutant, float, Reach]) -> dict[str, Any]:
    """Try one mutant; return its line of the results."""
    module, mutant, seconds, reach = task
    ran = run_tests(module, mutant.source, seconds, Order(reach, mutant.line))
    failed = re.search(r"^(?:FAILED|ERROR) .*?(tests/.+?)(?: - |$)", ran.out, flags=re.MULTILINE)
    ends = {0: None, ESCAPED: "it wrote outside its folder", -signal.SIGALRM: "it took too long"}
    by = ends.get(ran.status, failed[1] if failed else f"it ended with {ran.status}")
    about = {"number": mutant.number, "line": mutant.line, "before": mutant.before, "after": mutant.after}
    return identity(module) | about | {"killed": ran.status != 0, "by": by}


def identity(module: Module) -> dict[str, str]:
    """Return the name of a module, and what a result depends on: digests of its source and of its tests."""
    source, tests = (
        hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]
        for paths in ([module.path], module.tests)
    )
    return {"module": module.name, "source": source, "tests": tests}


class Results:
    """A file with a line of JSON for each mutant that was tried."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self._rows = {(row["module"], row["source"], row["number"]): row for row in rows}

    def known(self, module: Module, mutant: Mutant) -> dict[str, Any] | None:
        """Return what came out, unless the source has changed since, or it survived and there are other tests now."""
        now = identity(module)
        row = self._rows.get((now["module"], now["source"], mutant.number))
        return row if row and (row["killed"] or row["tests"] == now["tests"]) else None

    def add(self, row: dict[str, Any]) -> None:
        """Write one more line."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def try_mutants(module: Module, mutants: Sequence[Mutant], results: Results, pool: Pool) -> list[dict[str, Any]]:
    """Try the mutants that have no result yet; return the results of all.

    Raises:
        ValueError: no tests mirror the module, or they fail without a mutant.
    """
    if not module.tests:
        raise ValueError(f"no tests mirror it: write tests/{module.mirror}, or name others in SHARED of {__file__}")
    rows = {mutant: results.known(module, mutant) for mutant in mutants}
    left = [mutant for mutant in mutants if rows[mutant] is None]
    tried = []
    if left:
        began = time.monotonic()
        ran, reach = pool.apply(record, (module,))
        if ran.status == NO_TESTS:
            raise ValueError("none of the tests that mirror it is in the default run")
        if ran.status:
            raise ValueError(f"its tests end with {ran.status} without a mutant:\n{ran.out[-1000:]}{ran.err[-1000:]}")
        limit = 15 + 5 * (time.monotonic() - began)
        for row in pool.imap_unordered(outcome, [(module, mutant, limit, reach) for mutant in left]):
            results.add(row)
            tried.append(row)
    return [row for row in rows.values() if row is not None] + tried


def main() -> None:
    """Try a sample of mutants of each module; print a table by module and by room, then the survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="file that results are added to")
    parser.add_argument("--modules", nargs="+", default=["*"], metavar="PATTERN", help="such as 'packing/*' (all)")
    parser.add_argument("--sample", type=int, default=30, metavar="N", help="mutants of each module (default: 30)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="random seed of the samples (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants tried at a time (default: 1)")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="checkout to try (default: this one)")
    options = parser.parse_args()
    for name in PRELOADED:
        importlib.import_module(name)
    root, results, all_rows = options.root.resolve(), Results(options.results), []
    print(f"{'module':32}{'mutants':>9}{'killed':>9}{'survivors':>11}")
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for path in sorted((root / "refinfer").rglob("*.py"), key=lambda path: (len(path.parts), path)):
            module = Module(root, path)
            if not any(fnmatch(module.name, pattern) for pattern in options.modules):
                continue
            if mutants := draw(path.read_text(), options.sample, Random(f"{options.seed} {module.name}")):
                try:
                    rows = try_mutants(module, mutants, results, pool)
                except ValueError as error:
                    print(f"{module.name}: {error}")
                    continue
                all_rows += rows
                _print_row(module.name, rows)
    print()
    for room, in_room in groupby(all_rows, lambda row: row["module"].rpartition("/")[0]):
        _print_row(room or "(no room)", list(in_room))
    _print_row("all", all_rows)
    for row in sorted((row for row in all_rows if not row["killed"]), key=lambda row: (row["module"], row["line"])):
        print(f"{row['module']}:{row['line']}: {row['before']}  ->  {row['after']}")


def _print_row(name: str, rows: Sequence[dict[str, Any]]) -> None:
    killed = sum(row["killed"] for row in rows)
    print(f"{name:32}{len(rows):9}{killed:9}{len(rows) - killed:11}", flush=True)


if __name__ == "__main__":
    main()
