"""The pictures in a browser: their texts keep apart and stay inside, with narrow, usual and wide fonts.

A picture asks for `sans-serif`, and each machine has another font under that name. So that the test finds the same
everywhere, even where Chromium came without fonts, no font of the machine decides how wide a text is: each text is
stretched (`textLength`) to the width it has in one of four common families, from the widths of their letters in
`font_widths.json`. How far a text reaches above and below its line is 0.76 and 0.24 of its size, as in all of them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from browser import Browser
from refinfer.cli.pictures import plan_svg, to_svg
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.plan import Prefetch, make_plan
from refinfer.planning.report import simulate_plan
from refinfer.trace import Span, Trace

ROOT: Final = Path(__file__).parents[2]
FONT_WIDTHS: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("font_widths.json").read_text())
FAMILIES: Final = [name for name in FONT_WIDTHS if name != "characters"]
SLACK: Final = 1.0  # pixels
GAP: Final = 3.0  # pixels between two texts in a line
LEAST_CONTRAST: Final = 3.0
GRID_CONTRAST: Final = 2.2  # paler lines are those of a grid, and a text may lie over them

# Stretches every text to its width in a family. Returns for each picture its frame, and the boxes (left, top, right and
# bottom) and colours of its texts, rectangles and circles, in the order in which they are painted. Returns for each of
# its lines the texts that it runs through.
MEASURE: Final = """(characters, widths) => {
  const box = (element, {x, y, width, height}) => {
    const matrix = element.getCTM(), xs = [], ys = [];
    for (const corner of [[x, y], [x + width, y], [x, y + height], [x + width, y + height]]) {
      const point = new DOMPoint(...corner).matrixTransform(matrix);
      xs.push(point.x); ys.push(point.y);
    }
    return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
  };
  const advance = new Map([...characters].map((character, i) => [character, i]));
  const measure = element => {
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const look = {fill: style.fill, opacity: style.fillOpacity * style.opacity};
    if (element.localName !== 'text')
      return {...look, box: box(element, element.getBBox())};
    const words = element.textContent;
    const of = widths[style.fontWeight >= 600 ? 'bold' : 'normal'];
    const width = [...words].reduce((sum, character) => sum + (of[advance.get(character)] ?? 1000), 0) * size / 1000;
    element.setAttribute('lengthAdjust', 'spacingAndGlyphs');
    element.setAttribute('textLength', width);
    const y = element.getStartPositionOfChar(0).y - 0.76 * size;
    return {...look, words, box: box(element, {x: element.getBBox().x, y, width, height: size})};
  };
  return Array.from(document.querySelectorAll('body > svg'), svg => {
    const {x, y, width, height} = svg.viewBox.baseVal;
    svg.setAttribute('width', width); svg.setAttribute('height', height);
    const painted = Array.from(svg.querySelectorAll('text, rect, circle, ellipse')).filter(
      element => !element.closest('defs') && (element.localName !== 'text' || element.textContent));
    const shapes = painted.map(measure), texts = shapes.filter(shape => shape.words);
    const lines = Array.from(svg.querySelectorAll('line, polyline, path')).filter(
      line => !line.closest('defs') && getComputedStyle(line).stroke !== 'none');
    const crossed = lines.map(line => {
      line.samples ??= Array.from({length: line.getTotalLength() / 2}, (_, i) => {
        const {x, y} = line.getPointAtLength(2 * i).matrixTransform(line.getCTM());
        return [x, y];
      });
      const words = texts.filter(({box: [left, top, right, bottom]}) =>
        line.samples.some(([x, y]) => left + 1 < x && x < right - 1 && top + 1 < y && y < bottom - 1));
      return {colour: getComputedStyle(line).stroke, crosses: words.map(text => text.words)};
    });
    return {frame: [x, y, x + width, y + height], painted: shapes, lines: crossed};
  });
}"""


Colour = tuple[float, float, float]
Box = tuple[float, ...]
WHITE: Final = (255.0, 255.0, 255.0)


@dataclass(frozen=True)
class Shape:
    """A text (`words`), or a rectangle or circle: its box in pixels, its colour, and how much of it shows."""

    box: Box
    colour: Colour
    opacity: float
    words: str = ""

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def shared(self, other: Shape) -> tuple[float, float]:
        """Return how wide and how high what it shares with another is; less than zero if they are apart."""
        a, b = self.box, other.box
        return min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])

    def inside(self, box: Box) -> bool:
        left, top, right, bottom = self.box
        return left >= box[0] - SLACK and top >= box[1] - SLACK and right <= box[2] + SLACK and bottom <= box[3] + SLACK


def shape_of(found: dict[str, Any]) -> Shape:
    nothing = found["fill"] in {"none", "transparent"}
    colour = (0.0, 0.0, 0.0) if nothing else rgb(found["fill"])
    return Shape(tuple(found["box"]), colour, 0.0 if nothing else float(found["opacity"]), found.get("words", ""))


def rgb(css: str) -> Colour:
    """Return a colour as a style gives it; one that shows through, as it looks on white."""
    red, green, blue, *alpha = (float(part) for part in re.findall(r"[\d.]+", css))
    opacity = alpha[0] if alpha else 1.0
    return blend((red, green, blue), WHITE, opacity)


def blend(above: Colour, below: Colour, opacity: float) -> Colour:
    red, green, blue = (opacity * a + (1 - opacity) * b for a, b in zip(above, below, strict=True))
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    """Return how much brighter one colour is than the other, from 1 to 21, as WCAG 2 computes it."""

    def luminance(colour: Colour) -> float:
        parts = [c / 255 / 12.92 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def background_of(text: Shape, below: list[Shape], page: Colour) -> Colour:
    """Return the colour at the middle of a text, of what was painted before it on a page of that colour."""
    x, y = text.middle
    colour = page
    for shape in below:
        if not shape.words and shape.box[0] <= x <= shape.box[2] and shape.box[1] <= y <= shape.box[3]:
            colour = blend(shape.colour, colour, shape.opacity)
    return colour


def faults_of(frame: Box, painted: list[Shape], page: Colour) -> Iterator[str]:
    """Return what is wrong with the texts of a picture on a page of that colour, lines apart."""
    texts = [(number, shape) for number, shape in enumerate(painted) if shape.words]
    edges = [shape for shape in painted if not shape.words and shape.box != frame]
    for (_, one), (_, other) in itertools.combinations(texts, 2):
        wide, high = one.shared(other)
        if wide > -GAP and high > SLACK:
            yield f"'{one.words}' and '{other.words}' {f'overlap by {wide:.0f} pixels' if wide > 0 else 'touch'}"
    for number, text in texts:
        if not text.inside(frame):
            yield f"'{text.words}' leaves the picture"
        if any(min(text.shared(shape)) > SLACK and not text.inside(shape.box) for shape in edges):
            yield f"'{text.words}' crosses the edge of a shape"
        seen = contrast(text.colour, background_of(text, painted[:number], page))
        if seen < LEAST_CONTRAST:
            yield f"'{text.words}' has a contrast of {seen:.1f}"


def faults_in(browser: Browser, file: Path, pictures: dict[str, str]) -> list[str]:
    """Write a page of all pictures, open it, and return the faults with every family, light and dark."""
    head = '<!doctype html><meta charset="utf-8"><style>:root { color-scheme: light dark; background: Canvas }</style>'
    file.write_text(head + "".join(pictures.values()), encoding="utf-8")
    page = browser.page(file.as_uri())
    faults: list[str] = []
    for scheme, family in itertools.product(("light", "dark"), FAMILIES):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        canvas = rgb(page.run("getComputedStyle(document.documentElement).backgroundColor"))
        assert (sum(canvas) < 3 * 128) == (scheme == "dark")
        letters, widths = json.dumps(FONT_WIDTHS["characters"]), json.dumps(FONT_WIDTHS[family])
        for name, picture in zip(pictures, page.run(f"({MEASURE})({letters}, {widths})"), strict=True):
            painted = [shape_of(shape) for shape in picture["painted"]]
            crossed = [
                f"'{words}' is crossed by a line"
                for line in picture["lines"]
                for words in line["crosses"]
                if contrast(rgb(line["colour"]), WHITE) > GRID_CONTRAST
            ]
            found = [*faults_of(tuple(picture["frame"]), painted, canvas), *crossed]
            faults += [f"{name}, {family}, {scheme}: {fault}" for fault in found]
    page.close()
    return faults


def timeline(model: str, budget_share: float, threads: int, name: str) -> str:
    """Draw what `refinfer simulate --svg` draws."""
    inventory = Inventory(SHAPES[model], "int8")
    costs = costs_of(inventory, HERE, prefetch_threads=threads)
    budget = round(budget_share * inventory.streamable_nbytes)
    plan = make_plan("balanced", inventory, fixed_of(inventory, 64), budget, costs, Prefetch(threads))
    return to_svg(simulate_plan(inventory, plan, costs, traced=True).trace, name)


def plan(model: str) -> str:
    """Draw what `refinfer plan --svg` draws."""
    inventory = Inventory(SHAPES[model], "int8")
    budget = inventory.streamable_nbytes * 3 // 4
    return plan_svg(
        inventory, make_plan("balanced", inventory, fixed_of(inventory, 64), budget, costs_of(inventory, HERE))
    )


COMMITTED: Final = [
    *sorted((ROOT / "tutorials").rglob("*.svg")),
    *sorted((ROOT / "docs").rglob("*.svg")),
    *sorted((ROOT / "tests").rglob("*.svg")),
]
DRAWN: Final = {
    "plan of the storyteller": partial(plan, "storyteller"),
    "plan of Llama 2 70B": partial(plan, "llama2-70b"),
    "timeline of the storyteller": partial(timeline, "storyteller", 0.8, 2, "storyteller, int8"),
    "timeline of 400 ms": partial(
        to_svg, Trace((Span("disk 12", "read", "gate_proj", 0.0, 0.4),)), "storyteller, int8"
    ),
    "timeline under a long name": partial(timeline, "stories15m", 0.9, 1, "a model in a folder with a long name " * 9),
}


@pytest.mark.browser
@pytest.mark.spec("BOOK-11")
def test_every_text_of_a_picture_can_be_read_in_narrow_and_wide_fonts(browser: Browser, tmp_path: Path) -> None:
    pictures = {path.name: path.read_text(encoding="utf-8") for path in COMMITTED}
    pictures |= {name: draw() for name, draw in DRAWN.items()}
    faults = faults_in(browser, tmp_path / "pictures.html", pictures)
    assert not faults, "\n".join(faults)


BAD: Final = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 100" font-size="10">
<rect width="200" height="50" fill="#ffffff"/>
<text x="10" y="20">first</text><text x="20" y="22">second</text>
<text x="190" y="20">out</text>
<rect x="60" y="30" width="20" height="12" fill="#dddddd"/><text x="62" y="40">too long</text>
<text x="130" y="40" fill="#cccccc">pale</text>
<text x="160" y="40">struck</text><line x1="150" y1="36" x2="199" y2="36" stroke="#333333"/>
<text x="10" y="80">black</text>
</svg>"""


@pytest.mark.browser
@pytest.mark.spec("BOOK-11")
def test_each_fault_of_a_picture_is_found_and_named(browser: Browser, tmp_path: Path) -> None:
    faults = faults_in(browser, tmp_path / "bad.html", {"bad": BAD})
    start = f"bad, {FAMILIES[1]}, "
    light = [fault.removeprefix(start + "light: ") for fault in faults if fault.startswith(start + "light")]
    assert light == [
        "'first' and 'second' overlap by 6 pixels",
        "'out' leaves the picture",
        "'out' crosses the edge of a shape",
        "'too long' crosses the edge of a shape",
        "'pale' has a contrast of 1.6",
        "'struck' is crossed by a line",
    ]
    assert [fault for fault in faults if "'black'" in fault] == [
        f"bad, {family}, dark: 'black' has a contrast of 1.1" for family in FAMILIES
    ]
