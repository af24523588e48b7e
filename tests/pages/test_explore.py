"""The explorables show what Python computes, and can be used without a mouse.

The data files are recomputed and compared: all with `pytest -m long`, and a part of them always. What the
pages make of it is tried out in a Chromium without a screen (`browser`), on a site that is built for it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Final

import pytest

from refinfer.offload.budget import parse_budget
from refinfer.packing.formats import layout_of
from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import GoiLayout, draw
from refinfer.planning.cost import DEVICES, calibration_of, costs_of, units_of
from refinfer.planning.optimal import locked_array
from refinfer.planning.plan import PLANS, make_plan
from refinfer.planning.report import simulate_plan, sweep_rows
from refinfer.planning.simulate import Ring

sys.path.insert(0, str(Path(__file__).parent))
import explore_data as explore
from explore_tools import PAGES, SMALL, committed, entry_of, schedule

MOST_PACKING_BYTES: Final = 300_000


MOST_SCHEDULE_BYTES: Final = 1_500_000


def expand(runs: list[int]) -> list[int]:
    return [runs[i] + runs[i + 1] * j for i in range(0, len(runs), 3) for j in range(runs[i + 2])]


@pytest.mark.spec("BOOK-4")
def test_the_small_files_are_what_python_computes_now() -> None:
    for name, text in explore.small_files().items():
        assert (explore.DATA / name).read_text(encoding="utf-8") == text, "run tests/pages/explore_data.py"


@pytest.mark.spec("BOOK-4")
def test_there_are_no_other_files_and_they_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in explore.DATA.iterdir()}
    models = {f"schedule-{model}.js" for model in explore.MODELS}
    assert set(sizes) == {*explore.small_files(), *models}
    assert sizes["packing.js"] < MOST_PACKING_BYTES
    assert sum(sizes.values()) - sizes["packing.js"] < MOST_SCHEDULE_BYTES


@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize("N", explore.ROWS)
def test_a_layout_that_is_looked_up_serves_every_number_of_rows(N: int) -> None:
    layouts = committed("packing")["layouts"]
    for key, entry in layouts.items():
        K, nr, kr, sr, has_bias = key.split()
        tile = TileShape(int(nr), int(K) if kr == "K" else int(kr), int(sr))
        layout = GoiLayout(N, int(K), tile, has_bias=has_bias == "1")
        starts, turns = expand(entry["starts"]), expand(entry["turns"])
        patterns = [expand(pattern) for pattern in entry["patterns"]]
        for n in range(N):
            found = [starts[n] + offset for offset in patterns[turns[n]]]
            assert found == [layout.weight_index(n, k) for k in range(layout.padded_k)]
        if layout.has_bias:
            assert expand(entry["biases"])[:N] == [layout.bias_index(n) for n in range(N)]
        assert committed("packing")["tiles"][f"{N} {nr}"] * entry["tile"] == layout.elements


@pytest.mark.spec("BOOK-4")
def test_the_layouts_called_the_engines_own_are() -> None:
    presets = [preset for preset in explore.PRESETS if preset.name.startswith("refinfer")]
    assert [preset.name.partition(":")[0] for preset in presets] == list(explore.ENGINE)
    for preset, formats in zip(presets, explore.ENGINE.values(), strict=True):
        tile = explore.tile_of(preset.K, preset.nr, preset.kr, preset.sr)
        assert not preset.has_bias
        assert {layout_of(name, preset.N, preset.K).tile for name in formats} == {tile}


def test_every_layout_to_start_from_is_offered() -> None:
    for preset in explore.PRESETS:
        assert (preset.N in explore.ROWS, preset.K in explore.COLUMNS) == (True, True)
        assert explore.tile_of(preset.K, preset.nr, preset.kr, preset.sr) is not None


def compare(model: str, device: str, number: int, arms: tuple[str, ...] = explore.ARMS) -> None:
    """Recompute some runs and compare them."""
    for arm, outcome in schedule(model).outcomes(device, schedule(model).budgets[number], arms).items():
        assert entry_of(model, device, arm, number) == outcome.rounded(), f"{arm}: run tests/pages/explore_data.py"


@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize("model", explore.MODELS)
def test_what_is_said_of_a_model_is_what_python_computes_now(model: str) -> None:
    data = committed(f"schedule-{model}")
    about = schedule(model).about()
    assert {name: data[name] for name in about} == json.loads(json.dumps(about))
    assert {(device, arm) for device in data["runs"] for arm in data["runs"][device]} == {
        (device, arm) for device in DEVICES for arm in explore.ARMS
    }
    assert all(len(row) == len(about["budgets"]) for device in data["runs"].values() for row in device.values())


@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize(("device", "number"), [("nvme", 4), ("emmc", 0), ("ufs-3.1", 9), ("sata-ssd", 11)])
def test_runs_of_a_small_model_are_what_python_computes_now(device: str, number: int) -> None:
    compare(SMALL, device, number)


@pytest.mark.slow
@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize(
    ("model", "device", "arms"),
    [
        ("llama-1b", "ufs-4.0", ("balanced", "mmap")),
        ("llama2-7b", "nvme", ("leading", "optimal")),
        ("llama2-70b", "sata-ssd", ("flexinfer",)),
    ],
)
def test_some_runs_of_large_models_are_what_python_computes_now(model: str, device: str, arms: tuple[str, ...]) -> None:
    compare(model, device, 4, arms)


@pytest.mark.long
@pytest.mark.spec("BOOK-4")
@pytest.mark.parametrize("number", range(len(explore.SHARES) + 1))
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", explore.MODELS)
def test_every_run_is_what_python_computes_now(model: str, device: str, number: int) -> None:
    compare(model, device, number)


@pytest.mark.spec("BOOK-4")
def test_the_figures_are_those_that_refinfer_simulate_prints() -> None:
    small = schedule(SMALL)
    rows = list(
        sweep_rows(small.inventory, small.fixed, small.budgets, calibration_of("nvme"), explore.PREFETCH.threads)
    )
    for number, row in enumerate(rows):
        for arm in explore.ARMS:
            assert entry_of(SMALL, "nvme", arm, number).tokens_per_s == pytest.approx(row["tokens_per_s"][arm], 1e-4)
        ideal = entry_of(SMALL, "nvme", "optimal", number).ideal_tokens_per_s
        assert ideal == pytest.approx(row["ideal_tokens_per_s"], 1e-4)
    for share, budget in zip(explore.SHARES, small.budgets, strict=False):
        assert parse_budget(f"{share:.0%}", small.inventory.streamable_nbytes) == budget


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("number", [0, 4, 9])
def test_in_a_token_every_chunk_is_read_before_it_is_computed(plan: str, number: int) -> None:
    small = schedule(SMALL)
    costs = costs_of(small.inventory, calibration_of("nvme"), prefetch_threads=explore.PREFETCH.threads)
    made = make_plan(plan, small.inventory, small.fixed, small.budgets[number], costs, explore.PREFETCH)
    locked = locked_array(small.inventory, made.locked)
    run = explore.traced_run(units_of(small.inventory, costs, locked), Ring(max(made.ring_slots, 1)))
    token = explore.steady_token(run, (~locked).tolist())
    assert run.token_s == pytest.approx(simulate_plan(small.inventory, made, costs).token_s)
    assert token.end - token.start == pytest.approx(run.token_s)
    pairs = [(read, product) for read, product in zip(token.read_of, token.products, strict=True) if read]
    assert 0 <= int((~locked).sum()) - len(pairs) <= made.ring_slots, "all but those that were read before it began"
    assert all(read.name == product.name and read.end <= product.start for read, product in pairs)
    # What is waited for is computed the moment it has been read.
    ends = [token.start, *(product.end for product in token.products)]
    waited = [i for i, product in enumerate(token.products) if product.start > ends[i]]
    assert all(span is not None and span.end == token.products[i].start for i in waited for span in [token.read_of[i]])
    assert bool(waited) == (run.wait_s > 0)
    computing = sum(int(digit, 36) for digit in explore.strip(token)[1::2]) / 35 / explore.COLUMNS_OF_A_TOKEN
    assert computing == pytest.approx(1 - run.wait_s / run.token_s, abs=0.015)


@pytest.mark.spec("BOOK-4")
def test_the_three_things_to_try_come_out_as_the_page_says() -> None:
    leading, balanced = (entry_of("llama2-7b", "nvme", plan, 4) for plan in ("leading", "balanced"))
    quiet = [leading.picture[2 * column : 2 * column + 2] == "0z" for column in range(explore.COLUMNS_OF_A_TOKEN)]
    assert all(quiet[2:27]), "computing, and nothing to read"
    assert balanced.picture[0 : 2 * explore.COLUMNS_OF_A_TOKEN : 2] == "z" * explore.COLUMNS_OF_A_TOKEN
    assert balanced.waiting < leading.waiting / 2
    for number in range(5):  # up to half of the weights
        rates = [entry_of("llama2-7b", "emmc", plan, number).tokens_per_s for plan in PLANS[1:]]
        assert max(rates) < 1.05 * min(rates)
    rates = [entry_of("llama2-7b", "nvme", "mmap", number).tokens_per_s for number in range(len(explore.SHARES) + 1)]
    assert len(set(rates[:-1])) == 1
    assert rates[-1] > rates[0]


def test_what_the_page_shows_without_javascript_is_what_python_draws() -> None:
    shown = re.search(r"<pre>(.*?)</pre>", (PAGES / "packing.md").read_text(), flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == draw(GoiLayout(5, 3, TileShape(4, kr=2), has_bias=True))
    assert "<noscript>" in (PAGES / "schedule.md").read_text()


def attributes_of(script: str) -> list[dict[str, str]]:
    """Return the attributes of each element that a script makes to be reached with Tab, or to be read out."""
    blocks = [block for block in re.findall(r"{([^{}]*)}", script) if re.search("tabindex|aria-live", block)]
    pairs = [re.findall(r'"?([\w-]+)"?: (?:"([^"]*)"|(\d+))', block) for block in blocks]
    return [{name: text or number for name, text, number in found} for found in pairs]


@pytest.mark.spec("BOOK-5")
@pytest.mark.parametrize("name", ["packing", "schedule"])
def test_a_picture_that_keys_move_in_can_be_reached_and_says_where_its_words_are(name: str) -> None:
    """The scripts as they are written; what a browser makes of them is tried with `pytest -m browser`."""
    script = (PAGES / f"{name}.js").read_text()
    elements = attributes_of(script)
    announced = {element["id"] for element in elements if element.get("aria-live") == "polite"}
    assert f"{name}-words" in announced
    moved_in = [element for element in elements if "tabindex" in element]
    assert len(moved_in) == script.count("arrows(") > 0
    for element in moved_in:
        assert element["tabindex"] == "0"
        assert element["aria-describedby"] in announced
        assert element["aria-label"].endswith("Arrow keys move.")


@pytest.mark.spec("BOOK-5")
def test_the_arrow_keys_home_and_end_move_and_every_choice_has_a_label() -> None:
    script = (PAGES / "explore.js").read_text()
    keys = dict(re.findall(r"^ +(\w+): \[(.+?)\],$", script, flags=re.MULTILINE))
    assert keys == {
        "ArrowLeft": "-1, 0", "ArrowRight": "1, 0", "ArrowUp": "0, -1", "ArrowDown": "0, 1",
        "Home": "-Infinity, 0", "End": "Infinity, 0",
    }  # fmt: skip
    assert 'html("label", { for: id }, label)' in script
    for name in ("packing", "schedule"):
        page = (PAGES / f"{name}.js").read_text()
        made = re.findall(r'const (\w+) = html\("(?:input|select)", {.*?id: "([\w-]+)"', page, flags=re.DOTALL)
        assert made, "a checkbox or a slider"
        for variable, field in made:  # a label names it, or holds it
            assert re.search(rf'html\("label", {{ for: "{field}"|html\("label", {{[^}}]*}}, {variable}\b', page), field
    assert 'role: "img", "aria-label": about' in script
