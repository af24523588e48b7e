"""The house itself: which way imports point, where the dangerous powers live, what each module says of itself."""

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
from refinfer.packing.formats import FORMATS

PACKAGE = Path(refinfer.__file__).parent
TESTS = Path(__file__).parent
SPEC = TESTS.parent / "docs" / "spec.md"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What each room may import of refinfer, itself aside. The order is the order of the house, from the ground up.
GROUND = {"errors", "arrays", "trace", "process"}
ROOMS = GROUND | {"model", "packing", "weight_cache", "offload"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "arrays": {"errors"},
    "trace": set(),
    "process": set(),
    "model": {"errors", "arrays"},
    "packing": {"errors", "arrays"},
    "weight_cache": {"errors", "arrays", "trace", "packing"},
    "offload": GROUND | {"packing", "weight_cache", "model"},
    "prepare": ROOMS,
    "engine": ROOMS | {"prepare"},
    "generate": ROOMS | {"prepare", "engine"},
    "bench": ROOMS | {"prepare", "engine", "generate"},
    "cli_cache": ROOMS | {"prepare", "bench"},
    "cli_offload": ROOMS | {"prepare", "engine", "bench"},
    "cli": {""} | ROOMS | {"prepare", "engine", "generate", "bench", "cli_cache", "cli_offload"},
    "__init__": {"errors", "generate", "model", "weight_cache"},
    "__main__": {"cli"},
}

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
    "replacing files": (r"fsync|os\.replace|os\.rename|\.rename\(|fcntl|flock|lockf", {"weight_cache/publish.py"}),
    "raw reads": (
        r"os\.(p?readv?|open)\(|O_DIRECT|posix_fadvise",
        {"offload/store.py", "weight_cache/publish.py", "bench/machine.py", "bench/start.py", "cli.py"},
    ),
    "threads": (
        r"\bimport threading\b|\bfrom threading\b|concurrent\.futures|multiprocessing",
        {"offload/budget.py", "offload/prefetch.py", "offload/store.py"},
    ),
    "clocks": (
        r"\bimport time\b|\bfrom time\b|\bdatetime\b",
        {"trace.py", "bench/harness.py", "bench/matmul.py", "bench/offload.py"},
    ),
    "printing": (
        r"\bprint\(|sys\.std(out|err)|\brich\b",
        {"cli.py", "cli_cache.py", "cli_offload.py", "__main__.py", "bench/report.py"},
    ),
    "global random state": (r"np\.random\.(?!default_rng|Generator)|\bimport random\b", set()),
    "starting programs": (
        r"\bsubprocess\b|os\.(fork|exec|spawn|system)",
        {"bench/start.py", "bench/share.py", "bench/offload.py"},
    ),
}

# The modules that carry the two ideas, in reading order.
EVENING_PATH = (
    "packing/layout.py",
    "packing/int8.py",
    "packing/product.py",
    "packing/matmul.py",
    "weight_cache/provider.py",
    "weight_cache/format.py",
    "weight_cache/file.py",
    "weight_cache/mapped_file.py",
    "offload/plan.py",
    "offload/prefetch.py",
    "offload/source.py",
    "offload/streamed.py",
    "model/transformer.py",
)


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


def imports_of(module: str) -> Iterator[str]:
    """Yield the room of each refinfer module that `module` imports; "" for the package itself."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] == "refinfer":
                yield [*name.split("."), ""][1]


@pytest.mark.spec("HOUSE-1")
@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    room = room_of(module)
    assert set(imports_of(module)) - {room} <= MAY_IMPORT[room]


@pytest.mark.spec("HOUSE-1")
def test_the_picture_of_imports_has_no_cycle() -> None:
    done: set[str] = {""}
    while rest := {room: needs for room, needs in MAY_IMPORT.items() if room not in done}:
        ready = {room for room, needs in rest.items() if needs <= done}
        assert ready, f"these rooms need each other: {sorted(rest)}"
        done |= ready


@pytest.mark.spec("HOUSE-2", "ERR-3")
@pytest.mark.parametrize("power", POWERS)
def test_each_power_is_used_in_its_places_only(power: str) -> None:
    pattern, places = POWERS[power]
    users = {module for module in MODULES if re.search(pattern, code_without_strings(module))}
    assert users == places


@pytest.mark.spec("HOUSE-3")
def test_importing_refinfer_imports_neither_rich_nor_tokenizers() -> None:
    code = "import sys, refinfer, refinfer.cli; print(sorted({'rich', 'tokenizers'} & set(sys.modules)))"
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
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
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


def lines_of_code(module: str) -> int:
    """Count the lines with code on them: neither blank, nor only a comment, nor part of a docstring."""
    tree = ast.parse((PACKAGE / module).read_text())
    docstring_lines: set[int] = set()
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                docstring_lines |= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    source = (PACKAGE / module).read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines)


@pytest.mark.spec("HOUSE-7")
def test_the_package_carries_its_types() -> None:
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.spec("HOUSE-4")
def test_the_evening_path_is_at_most_1500_lines() -> None:
    assert sum(map(lines_of_code, EVENING_PATH)) <= 1500


@pytest.mark.spec("HOUSE-4")
def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings() -> None:
    assert lines_of_code("__main__.py") == 10


@pytest.mark.spec("HOUSE-5")
def test_every_clause_has_a_test_and_every_mark_a_clause() -> None:
    clauses = re.findall(r"^- \*\*([A-Z]+-\d+)\*\*", SPEC.read_text(), flags=re.MULTILINE)
    assert len(clauses) == len(set(clauses))
    marks: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for call in re.findall(r"mark\.spec\(([^)]*)\)", path.read_text()):
            marks |= set(re.findall(r'"([A-Z]+-\d+)"', call))
    assert marks == set(clauses)


@pytest.mark.spec("HOUSE-5")
def test_every_clause_names_its_source() -> None:
    lines = [line for line in SPEC.read_text().splitlines() if line.startswith("- **")]
    assert all(re.search(r"\*Source: .+\.\*$", line) for line in lines)


@pytest.mark.spec("HOUSE-6")
@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith(("__init__.py", "__main__.py"))])
def test_every_module_opens_with_a_doorplate(module: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / module).read_text())) or ""
    doorplate = re.sub(r"(?<!\n)\n(?!\n)", " ", docstring)  # a line to each paragraph
    if "Read more:" in doorplate:
        assert "Leaves to others:" in doorplate
        more = doorplate.partition("Read more:")[2].partition("\n")[0]
        assert re.match(r"\s+tutorials? \d\d", more)
    else:
        for part in ("Knows:", "Does not know:", "Tutorial:"):
            assert part in doorplate
        more = re.findall(r"Spec:.*|$", docstring)[0]
    named = re.findall(r"\b[A-Z]+-\d+", more)
    assert set(named) <= set(re.findall(r"\*\*([A-Z]+-\d+)\*\*", SPEC.read_text()))
