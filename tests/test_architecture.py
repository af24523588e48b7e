"""The house itself: which way imports point, where the dangerous powers live, what each module opens with."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import refinfer
from code_lines import lines_of_code
from refinfer.packing.formats import FORMATS

PACKAGE = Path(refinfer.__file__).parent
TESTS = Path(__file__).parent
SPEC = TESTS.parent / "docs" / "spec.md"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What each room may import of refinfer, itself aside. The order is the order of the house, from the ground up.
GROUND = {"errors", "arrays", "units", "clock", "trace", "process", "blas_threads", "one_user", "whole_file"}
ROOMS = {"packing", "weight_cache", "model", "inventory", "planning", "sources", "offload"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "arrays": {"errors"},
    "units": set(),
    "clock": set(),
    "trace": {"clock"},
    "process": set(),
    "blas_threads": {"process"},
    "one_user": {"errors"},
    "whole_file": set(),
    "packing": {"errors", "arrays"},
    "weight_cache": {"errors", "arrays", "clock", "process", "whole_file", "packing"},
    "model": {"errors", "arrays", "units", "whole_file"},
    "inventory": {"arrays", "packing", "model"},
    "planning": {"errors", "arrays", "units", "trace", "packing", "model", "inventory"},
    "sources": {"errors", "arrays", "clock", "process", "whole_file", "packing", "weight_cache", "model", "inventory"},
    "offload": GROUND | ROOMS - {"offload"},
    "prepare": GROUND | {"packing", "weight_cache", "model", "inventory"},
    "engine": GROUND | ROOMS | {"prepare"},
    "generate": GROUND | ROOMS | {"prepare", "engine"},
    "__init__": {"errors", "generate", "model", "weight_cache"},
    "bench": GROUND | ROOMS | {"prepare", "engine", "generate"},
    "labs": {""} | GROUND,
    "cli": {""} | GROUND | ROOMS | {"prepare", "engine", "generate", "bench", "labs"},
    "__main__": {"cli"},
}

PRINTING: tuple[str, ...] = (
    "cache",
    "ending",
    "generate",
    "lab",
    "machine",
    "main",
    "plan",
    "show",
    "simulate",
    "synth",
    "table",
)
PRINTING += ("terminal",)

# A power, as a pattern over code without strings and comments, and the modules that may use it.
POWERS: dict[str, tuple[str, set[str]]] = {
    "byte order": (
        r"\bimport struct\b|\bstruct\.|byteorder|\.byteswap\(",
        {"model/safetensors.py", "weight_cache/format.py"},
    ),
    "memory mapping": (
        r"\bimport mmap\b|np\.memmap|\bmmap\.mmap\b",
        {
            "model/safetensors.py",
            "weight_cache/mapped_file.py",
            "weight_cache/publish.py",
            "bench/machine.py",
            "bench/matmul.py",
        },
    ),
    "replacing files": (r"fsync|os\.replace|os\.rename|\.rename\(|flock|lockf", {"weight_cache/publish.py"}),
    "raw reads": (
        r"os\.(p?readv?|open)\(|O_DIRECT|posix_fadvise",
        {
            "whole_file.py",
            "offload/store.py",
            "weight_cache/ownership.py",
            "weight_cache/publish.py",
            "bench/machine.py",
            "bench/start.py",
            "cli/ending.py",
            "cli/terminal.py",
        },
    ),
    "threads": (
        r"\bimport threading\b|\bfrom threading\b|concurrent\.futures|multiprocessing",
        {"blas_threads.py", "offload/budget.py", "offload/prefetch.py", "offload/store.py"},
    ),
    "clocks": (
        r"\bimport time\b|\bfrom time\b|\bdatetime\b",
        {"clock.py", "bench/arm.py", "bench/harness.py"},
    ),
    "printing": (
        r"\bprint\(|sys\.std(out|err)|\brich\b",
        {f"cli/{name}.py" for name in PRINTING},
    ),
    "signals": (r"\bimport signal\b|\bfrom signal\b|\bsignal\.", {"cli/ending.py", "labs/check.py"}),
    "global random state": (r"np\.random\.(?!default_rng|Generator)|\bimport random\b", set()),
    "starting programs": (
        r"\bsubprocess\b|os\.(fork|exec|spawn|system)",
        {"bench/arm.py", "bench/share.py", "bench/start.py", "labs/check.py", "labs/run.py"},
    ),
}


def room_of(module: str) -> str:
    return module.removesuffix(".py").split("/")[0]


def code_tokens(module: str) -> Iterator[tokenize.TokenInfo]:
    source = (PACKAGE / module).read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in {tokenize.STRING, tokenize.COMMENT}:
            yield token


def code_without_strings(module: str) -> str:
    lines: dict[int, list[str]] = {}
    for token in code_tokens(module):
        lines.setdefault(token.start[0], []).append(token.string)
    joined = "\n".join(" ".join(line) for line in lines.values())
    return re.sub(r" ?([.(]) ?", r"\1", joined)


def syntax_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


def imports_of(module: str) -> Iterator[tuple[str, str]]:
    """Yield each name that `module` imports of refinfer, and the module it comes from; "" for the package itself."""
    for node in ast.walk(syntax_of(module)):
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "refinfer" for a in node.names), f"{module} imports a whole module"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            package, _, path = (node.module or "").replace(".", "/").partition("/")
            if package == "refinfer":
                for name in (alias.name for alias in node.names):
                    paths = (f"{path}/{name}.py".lstrip("/"), f"{path}.py", f"{path}/__init__.py")
                    yield name, next((p for p in paths if p in MODULES), "")


@pytest.mark.spec("HOUSE-1")
@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    room = room_of(module)
    assert {room_of(target) for _, target in imports_of(module)} - {room} <= MAY_IMPORT[room]


@pytest.mark.spec("HOUSE-1")
def test_a_room_imports_rooms_below_it_only() -> None:
    below: set[str] = {""}
    for room, needs in MAY_IMPORT.items():
        assert needs <= below, f"{room} needs {sorted(needs - below)}, which the order of the house puts above it"
        below.add(room)
    assert below - {""} == {room_of(module) for module in MODULES}


@pytest.mark.spec("HOUSE-2", "ERR-3")
@pytest.mark.parametrize("power", POWERS)
def test_each_power_is_used_in_its_places_only(power: str) -> None:
    pattern, places = POWERS[power]
    users = {module for module in MODULES if re.search(pattern, code_without_strings(module))}
    assert users == places


# Modules that only compute. What a token costs, which chunks to lock, where bytes lie: all of it can be tried on paper.
PURE = [m for m in MODULES if room_of(m) == "planning"]
PURE += ["packing/layout.py", "weight_cache/format.py", "model/sampler.py"]

# What they do without. They put numbers into bytes, so byte order is not among it.
IMPURE = {power: pattern for power, (pattern, _) in POWERS.items() if power != "byte order"} | {
    "files": r"\bimport (io|os|pathlib|shutil|tempfile)\b|\bfrom (io|os|pathlib|shutil|tempfile)\b|(?<![\w.])open\("
}


def used_imports(module: str) -> set[str]:
    """Return the modules of refinfer from which a module imports more than names for its annotations."""
    tree = syntax_of(module)
    for node in ast.walk(tree):
        for part in ("annotation", "returns"):
            if hasattr(node, part):
                setattr(node, part, None)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {target for name, target in imports_of(module) if name in used}


def reached_from(modules: Iterable[str]) -> set[str]:
    """Return the modules and all that they import, directly or not, except for annotations."""
    reached: set[str] = set()
    rest = set(modules)
    while rest:
        reached |= rest
        rest = {target for module in rest for target in used_imports(module)} - reached
    return reached


@pytest.mark.spec("HOUSE-9")
def test_planning_layout_format_and_sampler_and_all_they_import_use_no_file_clock_or_thread() -> None:
    reached = reached_from(PURE)
    assert reached > {*PURE, "inventory.py", "model/config.py", "packing/formats.py"}
    uses = {(m, power) for m in reached for power, p in IMPURE.items() if re.search(p, code_without_strings(m))}
    assert uses == set()


WATCHED = """
import sys
import time
import numpy as np
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.model.sampler import Sampling, sample
from refinfer.packing.layout import cut_into_chunks, TileShape
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.paper import paper_rows
from refinfer.planning.plan import PLANS, Prefetch, make_plan
from refinfer.cli.pictures import plan_svg
from refinfer.planning.report import layer_rows, plan_row, simulate_plan, sweep_rows

def compute():
    inventory = Inventory(SHAPES["stories15m"], "int8")
    fixed = fixed_of(inventory, 64)
    budget = fixed.total + inventory.streamable_nbytes // 2
    costs = costs_of(inventory, HERE)
    for name in PLANS:
        plan = make_plan(name, inventory, fixed, budget, costs)
        simulate_plan(inventory, plan, costs, traced=True)
        plan_row(inventory, plan), layer_rows(inventory, plan), plan_svg(inventory, plan)
    list(sweep_rows(inventory, fixed, [budget], HERE, 2))
    next(iter(paper_rows(compute_shares=(0.25,))))
    sample(np.linspace(-1, 1, 50, dtype=np.float32), Sampling(0.8, 5, 0.9), np.random.default_rng(1))

def note(event, _):
    if watching and event.split(".")[0] in {"open", "os", "socket", "subprocess", "mmap", "_thread", "time", "fcntl"}:
        seen.append(event)

def refuse(*_):
    seen.append("clock")
    raise AssertionError("a clock was read")

seen, watching = [], False
compute()  # whatever is imported late is imported now
for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"):
    setattr(time, name, refuse)
sys.addaudithook(note)
watching = True
compute()
watching = False
print(sorted(set(seen)))
"""


@pytest.mark.spec("HOUSE-9")
def test_planning_and_sampling_open_no_file_read_no_clock_and_start_no_thread_while_they_run() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# `load` is asked for everything that a session can be, by keywords.
MANY_PARAMETERS = {("generate.py", "load")}


def parameters_of(module: str) -> Iterator[tuple[str, int]]:
    """Yield the name of each function of a module, and how many parameters it takes besides `self` or `cls`."""
    for node in ast.walk(syntax_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            given = node.args
            names = [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
            names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
            yield getattr(node, "name", "lambda"), len([name for name in names if name not in {"self", "cls"}])


@pytest.mark.spec("HOUSE-10")
def test_no_function_takes_more_than_seven_parameters() -> None:
    many = {(module, name) for module in MODULES for name, n in parameters_of(module) if n > 7}
    assert many == MANY_PARAMETERS


@pytest.mark.spec("HOUSE-10")
def test_no_module_imports_more_than_twenty_of_the_others() -> None:
    assert max(len({target for _, target in imports_of(module)}) for module in MODULES) <= 20


@pytest.mark.spec("HOUSE-3")
def test_importing_refinfer_imports_neither_rich_nor_tokenizers_nor_jinja2() -> None:
    code = "import sys, refinfer, refinfer.cli.main; print(sorted({'rich', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FORMAT_PAGES = {"packing/formats.py", *(f"packing/{name}.py" for name in FORMATS)}

# Where a name that a format has is compared, or is the key of a table, and what it stands for there.
ABOUT_SOMETHING_ELSE: dict[tuple[str, str], str] = {
    ("model/synth.py", "{'f32', 'f16', 'bf16'}"): "the type a checkpoint is stored in",
    ("model/synth.py", "dtype == 'f32'"): "the type a checkpoint is stored in",
    ("model/synth.py", "dtype == 'bf16'"): "the type a checkpoint is stored in",
    ("weight_cache/packers.py", "{'f32', 'f16', 'bf16'}"): "the type a table of rows is stored in",
    ("weight_cache/packers.py", "key.format != 'f32'"): "the type that norms and biases are stored in",
    ("bench/pack.py", "{'f32', 'bf16', 'int8', 'int4'}"): "what a bench packs from, format by format",
}


def comparisons_with(names: Iterable[str], module: str) -> Iterator[str]:
    """Yield every comparison of a module with one of `names`: by `==`, `in`, `match`, or as the key of a table."""
    for node in ast.walk(syntax_of(module)):
        if isinstance(node, ast.Dict):
            node = ast.Set([key for key in node.keys if key is not None])  # noqa: PLW2901
        elif not isinstance(node, ast.Compare | ast.MatchValue):
            continue
        literals = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
        if any(name in literals for name in names):
            yield ast.unparse(node)


@pytest.mark.spec("HOUSE-8")
def test_only_the_pages_of_the_formats_and_their_table_compare_the_name_of_one() -> None:
    elsewhere = [module for module in MODULES if module not in FORMAT_PAGES]
    found = {(module, code) for module in elsewhere for code in comparisons_with(FORMATS, module)}
    assert found == set(ABOUT_SOMETHING_ELSE)


@pytest.mark.spec("HOUSE-8")
@pytest.mark.parametrize(
    "code",
    [
        "if name == 'int8': ...",
        "wide = 'bf16' != format.name",
        "wide = name in ('f32', 'other')",
        "scale = {'int4': 2}[name]",
        "match name:\n case 'int8' | 'int4': ...",
    ],
)
def test_a_format_whose_name_is_compared_is_noticed(code: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(code)
    assert len(list(comparisons_with(FORMATS, str(tmp_path / "module.py")))) >= 1


@pytest.mark.spec("HOUSE-7")
def test_the_package_carries_its_types() -> None:
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.spec("HOUSE-4")
def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings() -> None:
    assert lines_of_code(PACKAGE / "__main__.py") == 12


@pytest.mark.spec("HOUSE-5")
def test_every_clause_has_a_test_and_every_mark_a_clause() -> None:
    clauses = re.findall(r'^- <a id="([A-Z]+-\d+)"></a>\*\*\1\*\* ', SPEC.read_text(), flags=re.MULTILINE)
    assert len(clauses) == len(set(clauses))
    marks: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for call in re.findall(r"mark\.spec\(([^)]*)\)", path.read_text()):
            marks |= set(re.findall(r'"([A-Z]+-\d+)"', call))
    assert marks == set(clauses)


@pytest.mark.spec("HOUSE-5")
def test_every_clause_names_its_source() -> None:
    lines = [line for line in SPEC.read_text().splitlines() if line.startswith("- ")]
    assert all(re.search(r"\*Source: .+\.\*$", line) for line in lines)


@pytest.mark.spec("HOUSE-6")
@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith(("__init__.py", "__main__.py"))])
def test_every_module_opens_with_a_doorplate(module: str) -> None:
    docstring = ast.get_docstring(syntax_of(module)) or ""
    doorplate = re.sub(r"(?<!\n)\n(?!\n)", " ", docstring)  # a line to each paragraph
    assert "Leaves to others: " in doorplate
    more = doorplate.partition("Read more:")[2].partition("\n")[0]
    assert re.match(r" tutorials? \d\d", more)
    named = re.findall(r"\b[A-Z]+-\d+", more)
    assert set(named) <= set(re.findall(r"\*\*([A-Z]+-\d+)\*\*", SPEC.read_text()))
