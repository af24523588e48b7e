"""Writes `docs/explore/data/`: what the two explorables show, computed here and only looked up and drawn there.

    python tests/pages/explore_data.py

The files are scripts, because a page opened from a folder may load scripts but nothing else; each puts one value into
`refinferData`. Numbers that follow each other closely are kept short: `[first, step, count]` for evenly spaced ones,
two digits of base 36 for a place between 0 and 1. The same package gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from refinfer.arrays import BoolArray
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import GoiLayout
from refinfer.planning.account import Fixed, fixed_of
from refinfer.planning.cost import DEVICES, HERE, Costs, calibration_of, costs_of, ideal_token_s, units_of
from refinfer.planning.optimal import locked_array
from refinfer.planning.page_cache import lru_misses
from refinfer.planning.plan import PLANS, Plan, Prefetch, make_plan
from refinfer.planning.report import MMAP_SHARE, layer_rows
from refinfer.planning.simulate import Ring, Simulation, Synchronous, Unit, simulate
from refinfer.trace import Span

DATA: Final = Path(__file__).parents[2] / "docs" / "explore" / "data"

# --- The packing explorer ---------------------------------------------------------------------------------------------

ROWS: Final = (5, 8, 16, 40, 64)
COLUMNS: Final = (3, 8, 10, 16)
NRS: Final = (4, 8, 16, 32, 64)
KRS: Final = (1, 2, 4, 8, "K")
SRS: Final = (1, 2, 4)
_LONGEST_GROUP: Final = 16  # kr * sr columns; XNNPACK has none longer


@dataclass(frozen=True)
class Preset:
    """A layout with a name: `kr` may be "K", whole rows."""

    name: str
    N: int
    K: int
    nr: int
    kr: int | str
    sr: int
    note: str
    has_bias: bool = True


PRESETS: Final = (
    Preset(
        "A first look: 8 by 8, tiles of 4 rows", 8, 8, 4, 1, 1,
        "With kr = 1 a tile is its rows transposed: the kernel takes one column of four rows at a time.",
    ),
    Preset(
        "Everything padded: 5 by 3, nr = 4, kr = 2", 5, 3, 4, 2, 1,
        "Three columns fill pairs only with a zero, and the second tile has one row where four would fit.",
    ),
    Preset(
        "XNNPACK float32, plain C: nr = 4", 8, 10, 4, 1, 1,
        "The shape that needs no vector instructions.",
    ),
    Preset(
        "XNNPACK float32, Arm: nr = 8", 16, 10, 8, 1, 1,
        "Eight rows are two vector registers of four floats.",
    ),
    Preset(
        "XNNPACK float32, Arm, shuffled: nr = 8, sr = 4", 16, 8, 8, 1, 4,
        "Each row starts one column later than the row before it and wraps after four: a step is a diagonal.",
    ),
    Preset(
        "XNNPACK float32, AVX-512, few rows: nr = 16", 16, 10, 16, 1, 1,
        "Sixteen rows are one vector register of 512 bits. Checked byte for byte against XNNPACK.",
    ),
    Preset(
        "XNNPACK float32, AVX-512: nr = 32", 64, 10, 32, 1, 1,
        "Thirty-two rows are two vector registers of 512 bits. Checked byte for byte against XNNPACK.",
    ),
    Preset(
        "XNNPACK int8: nr = 64, kr = 4", 64, 16, 64, 4, 1,
        "Four neighbouring bytes are multiplied and added by one instruction. A bias here is a number of four bytes "
        "that a row's sum starts from; the scales and biases after each tile are left out of the picture. Checked "
        "byte for byte against XNNPACK.",
    ),
    Preset(
        "refinfer f32 and int8: 16 whole rows", 40, 10, 16, "K", 1,
        "What numpy likes best: a tile is 16 rows as they were. Biases are kept elsewhere, and so are int8's scales "
        "in this picture.",
        has_bias=False,
    ),
    Preset(
        "refinfer bf16: 16 whole rows", 40, 16, 16, "K", 1,
        "As f32. An odd K would be padded with one zero, so that two neighbours always make a word of 32 bits.",
        has_bias=False,
    ),
)  # fmt: skip
"""Layouts to start from. The last two are the engine's own, which `layout_of` gives; int4 packs two columns into a
byte and is no such order."""

ENGINE: Final = {"refinfer f32 and int8": ("f32", "int8"), "refinfer bf16": ("bf16",)}
"""The formats of the engine whose tiles a preset shows, by how its name begins."""


def runs(numbers: Iterable[int]) -> list[int]:
    """Return whole numbers as evenly spaced runs: first, step, count, and so on.

    Examples:
        >>> runs([0, 2, 4, 6, 9, 10, 11])
        [0, 2, 4, 9, 1, 3]
    """
    out: list[list[int]] = []
    for number in numbers:
        if out and out[-1][2] == 1:
            out[-1][1:] = [number - out[-1][0], 2]
        elif out and number == out[-1][0] + out[-1][1] * out[-1][2]:
            out[-1][2] += 1
        else:
            out.append([number, 1, 1])
    return [value for run in out for value in run]


def tile_of(K: int, nr: int, kr: int | str, sr: int) -> TileShape | None:
    """Return a choice as a tile shape; None where the explorer does not offer it."""
    size = K if isinstance(kr, str) else kr
    offered = sr == 1 if isinstance(kr, str) else kr * sr <= _LONGEST_GROUP
    return TileShape(nr, size, sr) if offered and sr <= nr else None


def _rows_of(layout: GoiLayout) -> dict[str, Any]:
    """Return where everything of a layout lies, pads and missing rows too.

    A weight lies at `starts[n] + patterns[turns[n]][k]`: rows that are stored alike share a pattern.
    """
    tile = layout.tile
    starts, turns, patterns = [], [], dict[tuple[int, ...], int]()
    for n in range(layout.n_tiles * tile.nr):
        where = [layout.weight_index(n, k) for k in range(layout.padded_k)]
        pattern = tuple(place - min(where) for place in where)
        starts.append(min(where))
        turns.append(patterns.setdefault(pattern, len(patterns)))
    return {
        "tile": layout.tile_elements,
        "step": tile.nr * tile.kr,
        "group": tile.kr,
        "paddedK": layout.padded_k,
        "starts": runs(starts),
        "turns": runs(turns),
        "patterns": [runs(pattern) for pattern in patterns],
        "biases": runs(layout.bias_index(n) for n in range(layout.n_tiles * tile.nr)) if layout.has_bias else [],
    }


def packing_data() -> dict[str, Any]:
    """Return every layout that the packing explorer offers.

    Where a weight lies does not depend on how many rows there are behind it: one entry, for the largest N, serves all.
    """
    layouts: dict[str, Any] = {}
    for K in COLUMNS:
        for nr in NRS:
            for kr in KRS:
                for sr in SRS:
                    tile = tile_of(K, nr, kr, sr)
                    for has_bias in (True, False) if tile else ():
                        assert tile is not None
                        key = f"{K} {nr} {kr} {sr} {int(has_bias)}"
                        layouts[key] = _rows_of(GoiLayout(max(ROWS), K, tile, has_bias))
    return {
        "choices": {"N": ROWS, "K": COLUMNS, "nr": NRS, "kr": KRS, "sr": SRS},
        "tiles": {f"{N} {nr}": GoiLayout(N, 1, TileShape(nr)).n_tiles for N in ROWS for nr in NRS},
        "presets": [vars(preset) for preset in PRESETS],
        "layouts": layouts,
    }


# --- The schedule explorer --------------------------------------------------------------------------------------------

MODELS: Final = {"qwen2-0.5b": "bf16", "llama-1b": "int8", "llama2-7b": "bf16", "llama2-70b": "int4"}
"""Published shapes, and the format each is shown in."""

SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Budgets, as shares of the packed weights; one more is added, in which everything fits."""

POSITIONS: Final = 512
PREFETCH: Final = Prefetch(threads=1)
ARMS: Final = (*PLANS, "synchronous", "mmap")
COLUMNS_OF_A_TOKEN: Final = 100
CLOSE_UP: Final = 24  # chunks
BEFORE_WAIT: Final = 10  # of them before the one that is waited for: a ring's eight, and two that need no reading
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"

ABOUT_ARMS: Final = {
    "none": "nothing is locked; every chunk is read for every token",
    "leading": "the first chunks of the model are locked, as many as fit: the paper's unbalanced baseline",
    "balanced": "the same share of every stretch of the model is locked",
    "attention-first": "the smallest matrices are locked first, kind by kind over all layers",
    "ffn-first": "gate, up and down are locked first",
    "flexinfer": "the paper's Algorithm 1, literally: whole tensors, some kinds over all layers",
    "optimal": "the best lock and ring of a stated family, by the simulator",
    "synchronous": "the locks of optimal, but each chunk is read only when it is needed",
    "mmap": "no plan: a page cache of the same size, which forgets what was used longest ago",
}


def base36(value: float, digits: int) -> str:
    """Return a value between 0 and 1 in so many digits of base 36."""
    number = round(min(max(value, 0.0), 1.0) * (36**digits - 1))
    out = ""
    for _ in range(digits):
        number, digit = divmod(number, 36)
        out = _DIGITS[digit] + out
    return out


@dataclass(frozen=True)
class Token:
    """The spans of one steady token: where it begins and ends, its products, and the read of each, if there is one.

    `reads` are all reads under way meanwhile, those for the next token too.
    """

    start: float
    end: float
    products: Sequence[Span]
    read_of: Sequence[Span | None]
    reads: Sequence[Span]


def traced_run(units: Sequence[Unit], gate: Ring | Synchronous) -> Simulation:
    """Run until steady, and one token more, so that the last but one has its picture with what is read for the next."""
    streamed = sum(unit.read_s > 0 for unit in units)
    filling = gate.slots // streamed if isinstance(gate, Ring) and streamed else 0
    return simulate(units, gate, tokens=filling + 4, traced=True)


def steady_token(run: Simulation, reads_anew: Sequence[bool]) -> Token:
    """Cut the last token but one out of a traced run; `reads_anew` says of each chunk whether it is read."""
    size, streamed = len(reads_anew), sum(reads_anew)
    products = [span for span in run.trace.spans if span.kind == "compute"]
    reads = [span for span in run.trace.spans if span.kind == "read"]
    assert len(products) == 2 * size, "a trace holds two tokens"
    # The last read is that of the last token's last streamed chunk: from there they are counted back. What was read
    # before the token began is not in the trace.
    numbers = iter(range(len(reads) - 2 * streamed, len(reads) - streamed))
    places = [next(numbers) if anew else -1 for anew in reads_anew]
    read_of = [reads[i] if i >= 0 else None for i in places]
    start, end = run.trace.start, products[size - 1].end
    meanwhile = [span for span in reads if span.end > start and span.start < end]
    return Token(start, end, products[:size], read_of, meanwhile)


def strip(token: Token) -> str:
    """Return the token in a hundred columns: of each, how much was spent reading, how much computing, a digit each."""
    step = (token.end - token.start) / COLUMNS_OF_A_TOKEN

    def shares(spans: Iterable[Span]) -> list[float]:
        filled = [0.0] * COLUMNS_OF_A_TOKEN
        for span in spans:
            first = max(0, int((span.start - token.start) / step))
            for column in range(first, COLUMNS_OF_A_TOKEN):
                begin = token.start + column * step
                if span.end <= begin:
                    break
                filled[column] += max(0.0, min(span.end, begin + step) - max(span.start, begin)) / step
        return filled

    pairs = zip(shares(token.reads), shares(token.products), strict=True)
    return "".join(base36(reading, 1) + base36(computing, 1) for reading, computing in pairs)


def first_of_close_up(token: Token) -> int:
    """Return the chunk a close-up begins with: a little before the first that is waited for, or else that is read."""
    size = len(token.products)
    ends = [token.start, *(span.end for span in token.products)]
    shortest = 1e-3 * min(span.end - span.start for span in token.products)
    waited = (i for i, span in enumerate(token.products) if span.start - ends[i] > shortest)
    read = (i for i, span in enumerate(token.read_of) if span is not None)
    around = next(waited, next(read, 0))
    return max(0, min(around - BEFORE_WAIT, size - CLOSE_UP))


def close_up(token: Token, inventory: Inventory, reads_anew: Sequence[bool]) -> str:
    """Return 24 chunks of the token, each with its product and its read.

    Three parts, separated by `|`: first chunk, first and last layer, milliseconds before it, in it, and waited in it;
    of each chunk its kind, whether it streams, where its product begins and ends, where its read does (`....` where
    it is not in sight); the reads of other chunks.
    """
    first = first_of_close_up(token)
    chunks = range(first, min(first + CLOSE_UP, len(token.products)))
    start = token.products[first - 1].end if first else token.start
    end = token.products[chunks[-1]].end
    kinds = list(inventory.kind_sizes)

    def places(span: Span | None) -> str:
        if span is None or span.end <= start or span.start >= end:
            return "...."
        return "".join(base36((at - start) / (end - start), 2) for at in (span.start, span.end))

    cycle = inventory.cycle
    layers = [cycle[i].layer for i in chunks]
    waited = end - start - sum(token.products[i].end - token.products[i].start for i in chunks)
    seconds = (start - token.start, end - start, max(waited, 0.0))
    about = [first, layers[0], layers[-1], *(round(1e3 * s, 3) for s in seconds)]
    units = [
        f"{kinds.index(cycle[i].kind)}{'ls'[reads_anew[i]]}{places(token.products[i])}{places(token.read_of[i])}"
        for i in chunks
    ]
    own = {id(token.read_of[i]) for i in chunks}
    others = [places(span) for span in token.reads if id(span) not in own]
    return "|".join((",".join(map(str, about)), "".join(units), "".join(place for place in others if place != "....")))


def lock_grid(inventory: Inventory, plan: Plan) -> str:
    """Return kind after kind the percentage that is locked, then the share of each layer's matrix, in two digits."""
    of_kind: dict[str, list[dict[str, Any]]] = {}
    for row in layer_rows(inventory, plan):
        of_kind.setdefault(row["kind"], []).append(row)
    return " ".join(
        f"{100 * sum(row['locked_bytes'] for row in rows) / sum(row['bytes'] for row in rows):.0f}:"
        + "".join(base36(row["locked_bytes"] / row["bytes"], 2) for row in rows)
        for rows in of_kind.values()
    )


class Table:
    """Values that many entries share, each kept once."""

    def __init__(self) -> None:
        self._number: dict[Any, int] = {}

    def add(self, value: Any) -> int:
        """Return the number of a value."""
        return self._number.setdefault(value, len(self._number))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._number)


@dataclass(frozen=True)
class Outcome:
    """What one arm comes to within one budget: figures, the account of the budget, locks, and pictures.

    The account: locked, ring, page cache, unused, read for each token, all in bytes; the chunks of the ring.
    """

    tokens_per_s: float
    ideal_tokens_per_s: float
    waiting: float
    account: tuple[int, int, int, int, int, int]
    grid: str
    picture: str

    def rounded(self) -> Outcome:
        """Return the same with as many digits as a page needs."""
        return replace(
            self,
            tokens_per_s=float(f"{self.tokens_per_s:.5g}"),
            ideal_tokens_per_s=float(f"{self.ideal_tokens_per_s:.5g}"),
            waiting=round(self.waiting, 4),
        )


@dataclass(frozen=True)
class Schedule:
    """One model in one format: its budgets, and every arm within each on every device."""

    model: str

    @cached_property
    def inventory(self) -> Inventory:
        """The model's chunks."""
        return Inventory(SHAPES[self.model], MODELS[self.model])

    @cached_property
    def fixed(self) -> Fixed:
        """What a run needs besides."""
        return fixed_of(self.inventory, POSITIONS)

    @cached_property
    def budgets(self) -> list[int]:
        """The budgets in bytes; in the last one everything fits."""
        total = self.inventory.streamable_nbytes
        return [*(int(share * total) for share in SHARES), self.fixed.total + total]

    def outcomes(self, device: str, budget: int, arms: Sequence[str] = ARMS) -> dict[str, Outcome]:
        """Return what each arm comes to."""
        inventory, calibration = self.inventory, calibration_of(device)
        costs = costs_of(inventory, calibration, prefetch_threads=PREFETCH.threads)
        planned = [arm for arm in arms if arm in PLANS]
        if len(planned) < len(arms) and "optimal" not in planned:
            planned.append("optimal")
        plans = {name: make_plan(name, inventory, self.fixed, budget, costs, PREFETCH) for name in planned}
        out = {}
        for arm in arms:
            if arm == "mmap":
                out[arm] = self._mmap(costs, plans["optimal"], budget)
                continue
            plan = plans[arm if arm in PLANS else "optimal"]
            gate = Ring(max(plan.ring_slots, 1)) if arm in PLANS else Synchronous()
            run = traced_run(units_of(inventory, costs, locked_array(inventory, plan.locked)), gate)
            account = plan.account
            streamed = inventory.streamable_nbytes - account.locked
            out[arm] = self._outcome(
                run,
                costs,
                plan,
                ~locked_array(inventory, plan.locked),
                (account.locked, account.ring, 0, account.unused, streamed, plan.ring_slots),
                lock_grid(inventory, plan),
            )
        return out

    def _mmap(self, costs: Costs, best: Plan, budget: int) -> Outcome:
        """Read what a page cache misses, at what page faults reach of the disk's bandwidth, each when it is needed."""
        inventory = self.inventory
        room = min(budget - self.fixed.total, inventory.streamable_nbytes)
        missed = lru_misses(inventory.sizes.tolist(), room)
        assert missed in {0, inventory.streamable_nbytes}, "a page cache misses all of a cyclic scan or nothing"
        anew = locked_array(inventory, ()) if not missed else ~locked_array(inventory, ())
        units = [
            Unit(read_s / MMAP_SHARE if missed else 0.0, compute_s, chunk.layer, chunk.kind)
            for chunk, read_s, compute_s in zip(inventory.cycle, costs.read_s, costs.compute_s, strict=True)
        ]
        run = traced_run(units, Synchronous())
        unused = budget - self.fixed.total - room
        return self._outcome(run, costs, best, anew, (0, 0, room, unused, missed, 0), "")

    def _outcome(
        self,
        run: Simulation,
        costs: Costs,
        ideal: Plan,
        anew: BoolArray,
        account: tuple[int, int, int, int, int, int],
        grid: str,
    ) -> Outcome:
        reads_anew: list[bool] = anew.tolist()
        token = steady_token(run, reads_anew)
        bound = ideal_token_s(costs, locked_array(self.inventory, ideal.locked), PREFETCH.threads)
        return Outcome(
            1 / run.token_s,
            1 / bound,
            run.wait_s / run.token_s,
            account,
            grid,
            strip(token) + "|" + close_up(token, self.inventory, reads_anew),
        )

    def about(self) -> dict[str, Any]:
        """Return what there is to say of the model whatever is chosen."""
        inventory, fixed = self.inventory, self.fixed
        chunks = {kind: len(numbers) for kind, numbers in inventory.chunks_of_kind.items()}
        layers = inventory.config.num_hidden_layers
        return {
            "model": self.model,
            "format": inventory.format,
            "bytes": inventory.streamable_nbytes,
            "chunks": len(inventory.cycle),
            "chunkBytes": int(inventory.sizes.max()),
            "layers": layers,
            "kinds": [
                {"name": kind, "bytes": nbytes, "chunks": chunks[kind] // (1 if kind == "lm_head" else layers)}
                for kind, nbytes in inventory.kind_sizes.items()
            ],
            "fixed": {
                "resident": fixed.resident,
                "kvCache": fixed.kv_cache,
                "scratch": fixed.scratch,
                "threads": fixed.threads,
            },
            "budgets": self.budgets,
        }

    def data(self) -> dict[str, Any]:
        """Return everything the explorer shows of this model."""
        accounts, grids, pictures = Table(), Table(), Table()
        runs: dict[str, dict[str, list[Any]]] = {device: {arm: [] for arm in ARMS} for device in DEVICES}
        for device, of_device in runs.items():
            for budget in self.budgets:
                for arm, outcome in self.outcomes(device, budget).items():
                    short = outcome.rounded()
                    figures = [short.tokens_per_s, short.ideal_tokens_per_s, short.waiting]
                    shared = [accounts.add(short.account), grids.add(short.grid), pictures.add(short.picture)]
                    of_device[arm].append(figures + shared)
        tables = {"accounts": list(accounts), "grids": list(grids), "pictures": list(pictures)}
        return self.about() | tables | {"runs": runs}


def schedule_index() -> dict[str, Any]:
    """Return what the schedule explorer offers to choose from."""
    return {
        "models": [
            {"name": name, "format": fmt, "bytes": Schedule(name).inventory.streamable_nbytes}
            for name, fmt in MODELS.items()
        ],
        "shares": [*SHARES, None],
        "devices": [{"name": name, "source": device.source} for name, device in DEVICES.items()],
        "arms": [{"name": arm, "about": ABOUT_ARMS[arm]} for arm in ARMS],
        "plans": PLANS,
        "processor": HERE.processor.name,
        "processorSource": HERE.processor.source,
        "positions": POSITIONS,
        "columns": COLUMNS_OF_A_TOKEN,
    }


# --- The files --------------------------------------------------------------------------------------------------------


def as_script(name: str, value: dict[str, Any]) -> str:
    """Return a value as a script that puts it under its name, one line for each entry of its large parts."""
    lines = []
    for key, part in value.items():
        if isinstance(part, dict) and part and all(isinstance(inner, (dict, list)) for inner in part.values()):
            inner = ",\n".join(f"{json.dumps(k)}:{_compact(v)}" for k, v in part.items())
            lines.append(f"{json.dumps(key)}:{{\n{inner}\n}}")
        elif isinstance(part, list) and len(part) > 1 and not isinstance(part[0], int | float):
            lines.append(f"{json.dumps(key)}:[\n" + ",\n".join(map(_compact, part)) + "\n]")
        else:
            lines.append(f"{json.dumps(key)}:{_compact(part)}")
    return (
        "// Written by tests/pages/explore_data.py; change that, and run it.\n"
        f"(self.refinferData ??= {{}})[{json.dumps(name)}] = {{\n" + ",\n".join(lines) + "\n};\n"
    )


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def small_files() -> dict[str, str]:
    """Return the files that are made in a moment, by name."""
    return {
        "packing.js": as_script("packing", packing_data()),
        "schedule.js": as_script("schedule", schedule_index()),
    }


def model_file(model: str) -> str:
    """Return the file of one model; this takes minutes for a large one."""
    return as_script(model, Schedule(model).data())


def main() -> None:
    """Write all files."""
    DATA.mkdir(parents=True, exist_ok=True)
    for name, text in small_files().items():
        (DATA / name).write_text(text, encoding="utf-8")
    for model in MODELS:
        (DATA / f"schedule-{model}.js").write_text(model_file(model), encoding="utf-8")


if __name__ == "__main__":
    main()
