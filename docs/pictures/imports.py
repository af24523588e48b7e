"""The house, storey by storey: a room imports rooms below its own storey only, as the code has it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import refinfer

PACKAGE = Path(refinfer.__file__).parent
GROUND = ("errors", "arrays", "units", "clock", "trace", "process", "blas_threads", "one_user", "whole_file")
ORDER = (
    *("the ground", "packing", "model", "weight_cache", "inventory", "planning", "sources", "offload"),
    *("prepare", "engine", "generate", "refinfer"),
)
BLUE, ORANGE, GREEN = "#4c78a8", "#f28e2b", "#59a14f"
COLOURS = {
    "packing": BLUE,
    "weight_cache": BLUE,
    "sources": BLUE,
    "planning": ORANGE,
    "offload": ORANGE,
    "model": GREEN,
}
GREY = "#bab0ac"
WIDTH, MARGIN, GAP, LINE, LETTER = 700, 12, 6, 20, 9.05


def room_of(module: str) -> str:
    """The room of a module; the modules below every room are the ground."""
    room = module.split(".", maxsplit=1)[0]
    if room in GROUND:
        return "the ground"
    return {"__init__": "refinfer", "": "refinfer", "__main__": "cli"}.get(room, room)


def imports_of(path: Path, known: set[str]) -> Iterator[str]:
    """Every module of refinfer that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "refinfer":
            base = (node.module or "").partition(".")[2]
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            yield from inner & known or {base}
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "refinfer")


def read_house() -> tuple[dict[str, list[str]], dict[str, Counter[str]]]:
    """The modules of each room, from the ground up, and how many pairs of modules join one room to another."""
    paths = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    imports = {module: set(imports_of(path, set(paths))) for module, path in paths.items()}
    modules: dict[str, list[str]] = {}
    needs: dict[str, Counter[str]] = {}
    for module in sorted(imports):
        room = room_of(module)
        modules.setdefault(room, []).append(module)
        joined = needs.setdefault(room, Counter())
        joined.update(other for target in imports[module] if (other := room_of(target)) != room)
    for room, inside in modules.items():
        height = storeys({module: Counter(imports[module] & set(inside)) for module in inside})
        names = sorted((module for module in inside if not module.endswith("__init__")), key=height.__getitem__)
        modules[room] = [name.rpartition(".")[2] for name in names]
    return modules, needs


def storeys(needs: dict[str, Counter[str]]) -> dict[str, int]:
    """How high each room, or each module of a room, lies: one above the highest that it imports."""
    height: dict[str, int] = {}
    while rest := [name for name in needs if name not in height]:
        ready = [name for name in rest if all(other in height for other in needs[name])]
        if not ready:
            raise ValueError(f"these import each other: {rest}")
        height |= {name: 1 + max((height[other] for other in needs[name]), default=-1) for name in ready}
    return height


def wrapped(words: list[str], width: float, joint: str) -> list[str]:
    """Words in lines no longer than `width`."""
    lines = [words[0]] if words else []
    for word in words[1:]:
        longer = lines[-1] + joint + word
        if len(longer) * LETTER <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text_of(room: str, modules: list[str], needs: list[tuple[str, int]], width: float) -> list[tuple[str, str]]:
    """What stands in a room, line by line, and how each line looks."""
    names = wrapped([name for name in modules if name != room or len(modules) > 1], width, " · ")
    imports = wrapped([f"{other} {n}" for other, n in needs], width, " · ")
    return [
        (' font-weight="bold"', "import refinfer" if room == "refinfer" else room),
        *(("", line) for line in names),
        *((' font-style="italic" fill="#555555"', line) for line in imports),
    ]


def draw() -> str:
    """Draw the house."""
    modules, needs = read_house()
    height = storeys(needs)
    rooms = sorted(needs, key=lambda room: (height[room], ORDER.index(room) if room in ORDER else len(ORDER)))
    sides: dict[str, tuple[float, float]] = {}
    texts: dict[str, list[tuple[str, str]]] = {}
    floors = [float(MARGIN)]
    for storey in range(max(height.values()) + 1):
        here = [room for room in rooms if height[room] == storey]
        share = (WIDTH - 2 * MARGIN + GAP) / len(here)
        for number, room in enumerate(here):
            sides[room] = MARGIN + share * number, MARGIN + share * (number + 1) - GAP
            counted = sorted(needs[room].items(), key=lambda item: rooms.index(item[0]))
            texts[room] = text_of(room, modules[room], counted, share - GAP - 20)
        floors.append(floors[-1] + GAP + 16 + LINE * max(len(texts[room]) for room in here))
    total = floors[-1] + MARGIN - GAP

    head = f'viewBox="0 0 {WIDTH} {total:g}" width="{WIDTH}" height="{total:g}" font-family="sans-serif" font-size="15"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {head}>',
        f'<rect width="{WIDTH}" height="{total:g}" fill="white"/>',
    ]
    for room in rooms:
        (left, right), colour = sides[room], COLOURS.get(room, GREY)
        top = total - floors[height[room] + 1] + GAP
        place = f'x="{left:g}" y="{top:g}" width="{right - left:g}" height="{total - floors[height[room]] - top:g}"'
        parts.append(f'<rect {place} rx="4" fill="{colour}" fill-opacity="0.18" stroke="{colour}"/>')
        parts += [
            f'<text x="{left + 10:g}" y="{top + 4 + LINE * number:g}"{look}>{escape(line)}</text>'
            for number, (look, line) in enumerate(texts[room], start=1)
        ]
    return "\n".join([*parts, "</svg>", ""])
