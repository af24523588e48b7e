"""The explorables in a browser: what they show, and that they can be used without a mouse."""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import GoiLayout
from refinfer.planning.cost import calibration_of, costs_of
from refinfer.planning.plan import make_plan
from refinfer.planning.report import layer_rows
from refinfer.units import format_nbytes

sys.path.insert(0, str(Path(__file__).parent))
import explore_data as explore
from browser import Browser, Page
from explore_tools import PAGES, ROOT, SMALL, entry_of, schedule


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a site of the two pages alone, with everything else as in `mkdocs.yml`."""
    pytest.importorskip("mkdocs", reason="there is no mkdocs here; pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    (folder / "docs").mkdir()
    (folder / "docs" / "explore").symlink_to(PAGES)
    (folder / "docs" / "site.css").symlink_to(ROOT / "docs" / "site.css")
    config = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": str(folder / "docs"),
        "site_dir": str(folder / "site"),
        "strict": False,  # their links lead to pages that are not built here
        "theme": {"font": False},
        "plugins": [],
        "nav": ["explore/packing.md", "explore/schedule.md"],
    }
    (folder / "mkdocs.yml").write_text(json.dumps(config))
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(folder / "mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, site: Path) -> Iterator[Open]:
    """Open the explorables as files; at the end none may have complained, or asked for anything elsewhere."""
    opened: list[Page] = []

    def open_(name: str, base: str = "", **options: Any) -> Page:
        base = base or site.as_uri()
        page = browser.page(f"{base}/explore/{name}/index.html", **options)
        opened.append(page)
        page.wait(f"document.getElementById('{name}-words')?.textContent")
        return page

    yield open_
    for page in opened:
        assert page.complaints() == []
        assert all(re.match(r"(file:///|http://127\.0\.0\.1:|data:)", url) for url in page.requests())
        page.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The address of the site on a server."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def element_of(page: Page, element: str) -> str:
    """Return the text of an element, its spaces as single ones."""
    return " ".join(page.text(element).split())


def pick(page: Page, element: str, value: str) -> None:
    """Choose an option as somebody at a keyboard does: move to the select, press arrow keys until it is there."""
    page.focus(element)
    page.press("Home")
    for _ in range(20):
        if page.run("document.activeElement.value") == value:
            return
        page.press("ArrowDown")
    raise AssertionError(f"{element} does not offer {value}")


def start_from(page: Page, preset: explore.Preset) -> GoiLayout:
    """Choose a layout by its name; return what Python makes of it."""
    pick(page, "packing-preset", str(explore.PRESETS.index(preset)))
    tile = explore.tile_of(preset.K, preset.nr, preset.kr, preset.sr)
    assert tile is not None
    return GoiLayout(preset.N, preset.K, tile, preset.has_bias)


def place_of(layout: GoiLayout, index: int, lane: int) -> str:
    """Say where an index lies, as the page does."""
    tile, within = divmod(index, layout.tile_elements)
    step = (within - layout.tile.nr * layout.has_bias) // (layout.tile.nr * layout.tile.kr)
    whole = layout.tile.kr == layout.padded_k
    named = "" if step < 0 or whole else f" step {step},"
    return f"index {index} of the packed matrix: tile {tile},{named} lane {lane}"


def weight_words(layout: GoiLayout, n: int, k: int) -> str:
    place = place_of(layout, layout.weight_index(n, k), n % layout.tile.nr)
    return f"The weight of row {n} and column {k}, number {n * layout.K + k} of the matrix as stored, lies at {place}."


@pytest.mark.browser
@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize("preset", explore.PRESETS, ids=lambda preset: preset.name)
def test_the_packing_explorer_says_where_a_weight_lies(open_page: Open, preset: explore.Preset) -> None:
    page = open_page("packing")
    layout = start_from(page, preset)
    for n, k in [(0, 0), (preset.N - 1, preset.K - 1), (preset.N // 2, preset.K // 3)]:
        index = layout.weight_index(n, k)
        for side in ("matrix", "tiles"):
            page.point_at(f"#packing-{side} [data-p='{index}'] rect")
            assert page.text("packing-words") == weight_words(layout, n, k)
            page.point_at("h1")
    assert page.text("packing-note") == preset.note


@pytest.mark.browser
@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize("preset", explore.PRESETS[:3], ids=lambda preset: preset.name)
def test_the_packing_explorer_draws_what_lies_at_each_index(open_page: Open, preset: explore.Preset) -> None:
    page = open_page("packing")
    layout = start_from(page, preset)
    cells = "[...document.querySelectorAll('#packing-tiles [data-p]')]"
    drawn = page.run(f"{cells}.map((cell) => [Number(cell.dataset.p), cell.textContent])")
    labels = [label.removeprefix("w").replace("--", "") for label in layout.labels()]
    assert dict(drawn) == dict(enumerate(labels))
    summary = page.text("packing-summary")
    assert f"The matrix has {layout.N * layout.K} weights and {layout.N} biases." in summary
    assert f"Packed it takes {layout.elements} elements, {layout.n_tiles} tiles of {layout.tile_elements}:" in summary
    padding = layout.elements - layout.N * (layout.K + 1)
    assert (f"{round(100 * padding / layout.elements)} % of all." if padding else "nothing is padding.") in summary


@pytest.mark.browser
@pytest.mark.spec("BOOK-5")
def test_the_packing_explorer_is_used_with_the_keyboard_alone(open_page: Open) -> None:
    page = open_page("packing")
    page.focus("packing-preset")
    stops = []
    for _ in range(11):
        stops.append(page.focused)
        page.press("Tab")
    fields = [f"packing-{name}" for name in ("N", "K", "nr", "kr", "sr", "bias")]
    pictures = ["packing-matrix", "packing-tiles", "packing-before", "packing-next"]
    assert stops == ["packing-preset", *fields, *pictures]

    for name, value in {"N": "5", "K": "10", "nr": "8", "kr": "2", "sr": "4"}.items():
        pick(page, f"packing-{name}", value)
    page.focus("packing-bias")
    page.press(" ")
    layout = GoiLayout(5, 10, TileShape(8, kr=2, sr=4))
    assert page.text("packing-words") == weight_words(layout, 1, 2)
    assert page.run("document.getElementById('packing-preset').value") == ""

    page.focus("packing-matrix")
    page.press("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp")
    assert page.text("packing-words") == weight_words(layout, 2, 2)
    page.press("End")
    assert page.text("packing-words") == weight_words(layout, 2, 9)

    page.focus("packing-tiles")
    page.press("Home")
    assert page.text("packing-words") == weight_words(layout, 0, 0)
    page.press("End")
    last = layout.elements - 1
    what = "There is no weight at {}. The matrix has no row 7; nobody reads what lies there."
    assert page.text("packing-words") == what.format(place_of(layout, last, 7))
    page.press("Home", "ArrowDown")  # a line is a step here
    assert page.text("packing-words").startswith("The weight of row 0 and column 2, number 2 ")

    page.focus("packing-next")
    page.press("Enter", " ")
    assert "tile 0, step 3, lane 0" in page.text("packing-words")
    page.press("Enter")
    pad = "A zero lies at {}. It pads row 0 from 10 to 16 columns."
    page.focus("packing-tiles")
    page.press("ArrowDown")
    page.press("ArrowRight", "ArrowRight")
    page.press("ArrowLeft", "ArrowLeft")
    assert page.text("packing-words") == pad.format(place_of(layout, layout.weight_index(0, 10), 0))
    page.focus("packing-before")
    page.press("Enter")
    assert "tile 0, step 4, lane 0" in page.text("packing-words")


@pytest.mark.browser
@pytest.mark.spec("BOOK-5")
def test_the_packing_explorer_says_what_is_no_weight(open_page: Open) -> None:
    page = open_page("packing")
    layout = start_from(page, explore.PRESETS[1])  # 5 by 3 in tiles of 4 by 2
    page.focus("packing-tiles")
    page.press("Home", "ArrowRight")
    assert (
        page.text("packing-words")
        == f"The bias of row 1 lies at {place_of(layout, 1, 1)}, in front of the tile's weights."
    )
    page.point_at(f"#packing-tiles [data-p='{layout.tile_elements + 1}'] rect")
    assert page.text("packing-words").startswith(
        f"There is no bias at {place_of(layout, layout.tile_elements + 1, 1)}."
    )
    page.point_at(f"#packing-tiles [data-p='{layout.weight_index(4, 3)}'] rect")
    pad = f"A zero lies at {place_of(layout, layout.weight_index(4, 3), 0)}. It pads row 4 from 3 to 4 columns."
    assert page.text("packing-words") == pad


@pytest.mark.browser
def test_a_tile_that_is_not_offered_becomes_the_nearest_that_is(open_page: Open) -> None:
    page = open_page("packing")
    pick(page, "packing-sr", "4")
    pick(page, "packing-kr", "8")
    assert page.run("document.getElementById('packing-sr').value") == "2"
    pick(page, "packing-kr", "K")
    assert page.run("document.getElementById('packing-sr').value") == "1"
    assert page.run("[...document.getElementById('packing-sr').options].map((o) => o.disabled)") == [False, True, True]
    assert page.text("packing-words") == weight_words(GoiLayout(8, 8, TileShape(4, kr=8), has_bias=True), 1, 2)


@pytest.mark.browser
def test_a_finger_points_too(open_page: Open) -> None:
    page = open_page("packing", width=390, height=800)
    page.send("Emulation.setTouchEmulationEnabled", enabled=True)
    layout = start_from(page, explore.PRESETS[0])
    x, y = page.middle(f"#packing-tiles [data-p='{layout.weight_index(5, 6)}'] rect")
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert page.text("packing-words") == weight_words(layout, 5, 6)


def three(value: float) -> str:
    """Return a figure with three digits, as the page does."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def percent(share: float) -> str:
    return f"{math.floor(100 * share + 0.5)} %"


def check_words(page: Page, model: str, device: str, arm: str, number: int) -> None:
    """Compare what the page says with what Python computes now."""
    about = schedule(model)
    budget = about.budgets[number]
    outcome = about.outcomes(device, budget, (arm,))[arm].rounded()
    locked, ring, page_cache, unused, read, ring_chunks = outcome.account
    said = element_of(page, "schedule-words")
    share = percent(explore.SHARES[number]) + " of the weights" if number < len(explore.SHARES) else "everything fits"
    expected = [
        f"{model} in {explore.MODELS[model]} on {device} with {arm}, within {format_nbytes(budget)} (",
        f"{share}): {three(outcome.tokens_per_s)} tokens per second, where no run with the",
        f"can do better than {three(outcome.ideal_tokens_per_s)}.",
        f"Each token reads {format_nbytes(read)} and takes " if read else "Nothing is read; a token takes ",
        f"the computation waits {percent(outcome.waiting)}." if read else "",
        f"The page cache has {format_nbytes(page_cache)}." if arm == "mmap" else f"Locked are {format_nbytes(locked)}",
        f"; the ring has {ring_chunks} chunks, {format_nbytes(ring)}." if ring else "",
    ]
    for part in expected:
        assert part in said
    spent = element_of(page, "schedule-account")
    for nbytes in (about.fixed.kv_cache, about.fixed.scratch, about.fixed.resident, unused, locked or page_cache):
        assert f"{format_nbytes(nbytes)}{100 * nbytes / budget:.1f} %" in spent
    rates = page.run("[...document.querySelectorAll('#schedule-all .arm-rate')].map((rate) => rate.textContent)")
    assert rates == [three(entry_of(model, device, arm, number).tokens_per_s) for arm in explore.ARMS]


STATES: Final = [
    (SMALL, "nvme", "leading", 4),
    (SMALL, "emmc", "balanced", 0),
    (SMALL, "ufs-3.1", "optimal", 7),
    (SMALL, "sata-ssd", "synchronous", 5),
    (SMALL, "virtual-disk", "mmap", 10),
    (SMALL, "ufs-4.0", "flexinfer", 11),
    ("llama-1b", "nvme", "none", 3),
    ("llama2-70b", "emmc", "attention-first", 2),
]


@pytest.mark.browser
@pytest.mark.spec("BOOK-4", "BOOK-5")
def test_the_schedule_explorer_says_what_python_computes_now(open_page: Open) -> None:
    page = open_page("schedule")
    for model, device, arm, number in STATES:
        for name, value in (("model", model), ("device", device), ("arm", arm)):
            pick(page, f"schedule-{name}", value)
        page.focus("schedule-budget")
        page.press("Home", *["ArrowRight"] * number)
        page.wait(f"document.getElementById('schedule-words').textContent.startsWith('{model} in')")
        check_words(page, model, device, arm, number)


@pytest.mark.browser
@pytest.mark.spec("BOOK-5")
def test_the_schedule_explorer_is_used_with_the_keyboard_alone(open_page: Open) -> None:
    page = open_page("schedule")
    page.focus("schedule-model")
    stops = []
    for _ in range(5):
        stops.append(page.focused)
        page.press("Tab")
    assert stops == [f"schedule-{name}" for name in ("model", "device", "arm", "budget", "grid")]

    pick(page, "schedule-model", SMALL)
    page.wait(f"document.getElementById('schedule-words').textContent.startsWith('{SMALL} in')")
    pick(page, "schedule-arm", "attention-first")
    page.focus("schedule-budget")
    page.press("End")
    assert "everything fits" in page.run("document.activeElement.getAttribute('aria-valuetext')")
    page.press("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight", "ArrowRight", "ArrowRight")
    budget = f"50 % of the weights, {format_nbytes(schedule(SMALL).budgets[4])}"
    assert page.run("document.activeElement.getAttribute('aria-valuetext')") == budget

    small = schedule(SMALL)
    costs = costs_of(small.inventory, calibration_of("nvme"), prefetch_threads=explore.PREFETCH.threads)
    plan = make_plan("attention-first", small.inventory, small.fixed, small.budgets[4], costs, explore.PREFETCH)
    rows = {(row["kind"], row["layer"]): row for row in layer_rows(small.inventory, plan)}
    page.focus("schedule-grid")
    page.press(*["ArrowDown"] * 5, *["ArrowRight"] * 3)
    row = rows["up_proj", 3]
    share = f"{100 * row['locked_bytes'] / row['bytes']:.0f} %"
    assert page.text("schedule-cell") == f"Layer 3, up_proj: {share} of {format_nbytes(row['bytes'])} locked."
    page.press("ArrowDown", "ArrowDown", "ArrowDown")
    assert page.text("schedule-cell").startswith("The output table: 0 % of")
    for kind in small.inventory.kind_sizes:
        of_kind = [row for (name, _), row in rows.items() if name == kind]
        locked = sum(row["locked_bytes"] for row in of_kind) / sum(row["bytes"] for row in of_kind)
        assert f"{kind} {100 * locked:.0f} %" in page.text("schedule-kinds")

    page.press("Tab", "Tab")  # from the grid past the first plan to the second
    page.press("Enter")
    assert page.run("document.activeElement.dataset.arm") == "leading"
    assert page.run("document.getElementById('schedule-arm').value") == "leading"
    check_words(page, SMALL, "nvme", "leading", 4)


@pytest.mark.browser
@pytest.mark.spec("BOOK-4")
def test_the_command_below_the_schedule_prints_the_same(open_page: Open, capsys: pytest.CaptureFixture[str]) -> None:
    from refinfer.cli.main import main

    page = open_page("schedule")
    pick(page, "schedule-model", SMALL)
    page.wait(f"document.getElementById('schedule-words').textContent.startsWith('{SMALL} in')")
    for number in (4, len(explore.SHARES)):
        page.focus("schedule-budget")
        page.press("Home", *["ArrowRight"] * number)
        command = page.text("schedule-command").split()
        assert command[:2] == ["refinfer", "simulate"]
        main([*command[1:], "--json"])
        printed = json.loads(capsys.readouterr().out)
        shown = entry_of(SMALL, "nvme", "leading", number)
        assert printed["budget_bytes"] == schedule(SMALL).budgets[number]
        assert printed["predicted_tokens_per_s"] == pytest.approx(shown.tokens_per_s, 1e-4)


@pytest.mark.browser
def test_a_budget_is_chosen_in_the_curve_too(open_page: Open) -> None:
    page = open_page("schedule")
    page.wait("document.querySelector('#schedule-sweep [data-budget]')")
    x, y = page.middle("#schedule-sweep [data-budget='2']")
    for kind in ("mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert "(30 % of the weights)" in page.text("schedule-words")


@pytest.mark.browser
@pytest.mark.parametrize("name", ["packing", "schedule"])
def test_an_explorable_works_behind_a_server(open_page: Open, served: str, name: str) -> None:
    open_page(name, served)


@pytest.mark.browser
def test_a_model_that_cannot_be_loaded_is_said(browser: Browser, site: Path) -> None:
    page = browser.page(f"{site.as_uri()}/explore/schedule/index.html")
    page.wait("document.getElementById('schedule-words')?.textContent")
    page.run("document.getElementById('schedule-model').options[0].value = 'gone'")
    pick(page, "schedule-model", "gone")
    page.wait("document.getElementById('schedule-words').textContent === 'data/schedule-gone.js cannot be loaded.'")
    page.close()


# The texts of all pictures that overlap, two by two. What a line has above and below its letters does not count. Fonts
# of one width are about as wide everywhere.
OVERLAPS = """[...document.querySelectorAll('.explorer svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim()).map(text => {
    const {left, right, top, bottom} = text.getBoundingClientRect();
    const spare = (bottom - top - parseFloat(getComputedStyle(text).fontSize)) / 2;
    return {words: text.textContent, left, right, top: top + spare, bottom: bottom - spare};
  });
  return texts.flatMap((a, i) => texts.slice(i + 1).filter(b =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1).map(b => `${a.words} and ${b.words}`));
})"""


@pytest.mark.browser
@pytest.mark.spec("BOOK-5", "BOOK-11")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["packing", "schedule"])
def test_an_explorable_can_be_read_on_a_phone_and_in_the_dark(
    open_page: Open, name: str, width: int, dark: bool
) -> None:
    page = open_page(name, width=width, dark=dark)
    page.wait(f"document.querySelector('#{name}-explorer svg text')")
    if name == "packing":
        start_from(page, explore.PRESETS[7])  # the largest
    assert page.run("document.documentElement.scrollWidth") <= width
    script = "[...document.querySelectorAll('.explorer svg text')].map((t) => parseFloat(getComputedStyle(t).fontSize))"
    assert min(page.run(script)) >= 12
    assert page.run(OVERLAPS) == []
    # Everything to choose with has a label, every picture a name, and what is drawn is said where it is announced.
    unnamed = "[...document.querySelectorAll('.explorer :is(select, input)')].filter((e) => !e.labels.length).length"
    assert page.run(unnamed) == 0
    assert page.run("[...document.querySelectorAll('.explorer svg')].every((e) => e.getAttribute('aria-label'))")
    assert page.run(f"document.getElementById('{name}-words').getAttribute('aria-live')") == "polite"
    style = f"getComputedStyle(document.getElementById('{name}-words'))"
    text, behind = (
        sum(map(float, re.findall(r"[\d.]+", page.run(f"{style}.{colour}"))[:3]))
        for colour in ("color", "backgroundColor")
    )
    assert (text > behind) == dark
