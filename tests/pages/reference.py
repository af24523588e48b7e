"""Writes `docs/reference/`: a page for each module, made from the module itself and from the table below.

    python tests/pages/reference.py

A module's doorplate gives its clauses and tutorials, `__all__` its names (without it, all that are not private), the
folder of tests its tests. What no module says of itself, and only a reader of the two originals knows, is `ORIGINS`:
what of the article, of the paper, or of the code of XNNPACK and LiteRT the module implements. Its order is the reading
order.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from doors import in_the_repository

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "refinfer"
TESTS: Final = ROOT / "tests"
PAGES: Final = ROOT / "docs" / "reference"

TUTORIALS: Final = sorted((ROOT / "tutorials").glob("[0-9][0-9]-*.md"))

_INTRODUCTION: Final = (
    "A page for each module, room by room, in the order in which they are best read. Each page says what teaches the "
    "module, which clauses of the specification it carries, which tests hold them, and what of the article, the paper "
    "or the code of XNNPACK it implements; then come its public names, from their docstrings, with their source."
)
OWN: Final = "refinfer itself; neither the article nor the paper says anything here"

# By room, in reading order: what a module implements.
ORIGINS: Final[dict[str, dict[str, str]]] = {
    "The front door": {
        "generate": "refinfer itself; it reports what the article measures: time to the first token, peak memory",
        "engine": "refinfer itself; here a run becomes the article's (a mapped file) or the paper's (a budget)",
        "prepare": (
            "the article: pack at the first start, skip packing at every later one. LiteRT, `xnnpack_delegate.cc`: a "
            "path, `:memory`, or a run without a weight cache where its file cannot be used"
        ),
    },
    "The ground": {
        "errors": OWN,
        "arrays": OWN,
        "units": OWN,
        "clock": OWN,
        "trace": "refinfer itself; the file it writes is in the Trace Event Format, which Chrome and Perfetto read",
        "process": "refinfer itself; the peak resident set is one of the article's three measures",
        "blas_threads": OWN,
        "one_user": OWN,
        "whole_file": OWN,
    },
    "The model room": {
        "model.config": "neither original; the published configs of Llama, Mistral, Qwen2 and Qwen3",
        "model.config_json": "neither original; `transformers`, `configuration_*.py`",
        "model.config_keys": "neither original; what the code of `transformers` reads from a config",
        "model.weights": "refinfer itself; through this Protocol the article's weights and the paper's look alike",
        "model.layers": (
            "neither original; RMSNorm, rotary embeddings, grouped-query attention and SwiGLU, each from its "
            "[paper](BIBLIOGRAPHY#the-transformer)"
        ),
        "model.kv_cache": "refinfer itself; the paper's memory budget says nothing of a KV cache, here it is counted",
        "model.transformer": "neither original; the family of models that the paper runs, Llama 2",
        "model.sampler": "neither original; top-k and top-p from their [papers](BIBLIOGRAPHY#the-transformer)",
        "model.generation_config": "neither original; `generation_config.json`, as `transformers` reads it",
        "model.safetensors": "neither original; the [safetensors format](BIBLIOGRAPHY#files-and-formats)",
        "model.checkpoint": "neither original; Hugging Face's sharded checkpoints and their index",
        "model.tokenizer_config": "neither original; Hugging Face's `tokenizer_config.json`",
        "model.tokenizer": "neither original; the file format of Hugging Face's `tokenizers`",
        "model.chat": "neither original; the chat templates of `transformers`",
        "model.folder": OWN,
        "model.hub": "neither original; the cache of `huggingface_hub`",
        "model.other_forms": OWN,
        "model.synth": OWN,
    },
    "The packing room": {
        "packing.product": "XNNPACK, `src/configs/gemm-config.c`, in spirit: the number of rows picks the kernel",
        "packing.layout": (
            "the article: weights are repacked into an internal layout that is read in sequence. XNNPACK's words for "
            "a tile are nr, kr and sr. Chunks are refinfer's"
        ),
        "packing.f32": "refinfer itself: whole rows, which BLAS likes; XNNPACK's own tile is in `packing/xnnpack`",
        "packing.bf16": "refinfer itself: whole rows, read as words, because numpy has no bfloat16",
        "packing.int8": "XNNPACK's quantised weights, a scale for each output channel, in a tile of refinfer's own",
        "packing.int4": (
            "refinfer's own layout of an idea known from llama.cpp's Q4_0, the format of the paper's models: a scale "
            "for each block of 32"
        ),
        "packing.formats": "refinfer itself; XNNPACK too has a tile for each type, in `src/configs/gemm-config.c`",
        "packing.matmul": "the article's reason for packing: at inference, packed weights are read front to back",
        "packing.xnnpack": (
            "XNNPACK, `src/reference/packing.cc`, `xnn_pack_f32_gemm_goi_w` and `xnn_pack_qs8_gemm_goi_w`, byte for "
            "byte: the layouts that the article is about"
        ),
    },
    "The weight cache room": {
        "weight_cache.key": (
            "XNNPACK, `include/xnnpack.h`, `xnn_weights_cache_look_up_key`; LiteRT, `weight_cache.h`, the pack "
            "identifier. Field by field, where those have an XOR and a number"
        ),
        "weight_cache.packers": "XNNPACK, `src/operators/fingerprint_cache.c`: a fingerprint of what packing does",
        "weight_cache.provider": (
            "the article: an interface that behaves as a dictionary which XNNPACK fills and queries. XNNPACK, "
            "`include/xnnpack.h`, `xnn_weights_cache_provider`"
        ),
        "weight_cache.memory": (
            "LiteRT's path `:memory`, and the article's plan for later: one copy of equal weights also without a file"
        ),
        "weight_cache.format": (
            "LiteRT, `weight_cache.h` (the header) and `weight_cache_schema.fbs` (the index). The checksums are "
            "refinfer's: LiteRT's file has no checksums"
        ),
        "weight_cache.ownership": OWN,
        "weight_cache.publish": "refinfer itself; LiteRT writes its file in place, without a lock and without fsync",
        "weight_cache.mapped_file": (
            "the article: packed weights are loaded from disk by mmap, and processes share the pages. LiteRT, "
            "`mmap_handle.cc`. The checks are refinfer's"
        ),
        "weight_cache.file": "the article: packed weights are saved to disk once. LiteRT, `weight_cache.cc`",
        "weight_cache.identity": (
            "the article: the cache is invalid once weights or structure of the model change. LiteRT leaves that to "
            "its users; how it is noticed here is git's, from its index"
        ),
        "weight_cache.load_or_build": (
            "LiteRT, `weight_cache.cc`, `LoadOrStartBuild`. The article: what makes a file invalid, the model or the "
            "packing code"
        ),
        "weight_cache.directory": "refinfer itself; LiteRT's README leaves old files to the user",
    },
    "The inventory": {
        "inventory": "the paper: layers of attention and FFN tensors, used in the same order for each token",
    },
    "The planning room": {
        "planning.account": "the paper: a memory budget that the user gives; an account of every byte is refinfer's",
        "planning.locks": (
            "the paper: balanced memory locking; flexible tensor preservation, Algorithm 1; and what it is compared "
            "with, locks of leading layers, attention first, FFN first"
        ),
        "planning.own_plan": OWN,
        "planning.page_cache": "[Belady 1966](BIBLIOGRAPHY#reading-from-disk); the paper: why mmap stays slow, Table 1",
        "planning.simulate": (
            "the paper: the prefetch window, and reading with and without overlap. The virtual clock is refinfer's"
        ),
        "planning.cost": "the paper, formula (4): a token takes the longer of computing and reading",
        "planning.optimal": "refinfer itself, in the place of Algorithm 1",
        "planning.plan": (
            "the paper: the window is taken from the budget first, then tensors are locked, before the run"
        ),
        "planning.report": OWN,
        "planning.paper": "the paper's evaluation: its models, its arms, its gains over mmap and in the ablation",
    },
    "The room of sources": {
        "sources.matrices": OWN,
        "sources.packed": "the article: packed weights are used where they lie, in memory or mapped",
        "sources.mapped": "the article: mmap instead of a copy. What is checked, and when, is refinfer's",
        "sources.own_source": OWN,
    },
    "The offload room": {
        "offload.budget": "the paper: a memory budget that the user gives; that it is counted is refinfer's",
        "offload.store": "the paper, asynchronous prefetching: direct I/O, past the page cache",
        "offload.readers": "the paper: synchronous reading, its baseline; and why mmap stays slow, Table 1",
        "offload.prefetch": (
            "the paper, asynchronous prefetching: threads of their own read ahead, computing waits for the one tensor "
            "that it needs, and the buffer is used again. A ring of chunks stands for the window of layers"
        ),
        "offload.packed_file": "refinfer itself: the file that the article maps, read as the paper reads",
        "offload.streamed": (
            "the paper: each layer is a locked part and a part that is loaded for each token. That it is read from the "
            "article's file is refinfer's"
        ),
        "offload.calibration": "refinfer itself; the paper takes the bandwidth of its disk as given",
        "offload.prediction": "the paper, formula (4), with this machine's own figures",
        "offload.run": OWN,
    },
    "The bench room": {
        "bench.machine": OWN,
        "bench.abilities": OWN,
        "bench.harness": OWN,
        "bench.entry": OWN,
        "bench.matmul": "refinfer itself; XNNPACK's tile shapes are among the candidates",
        "bench.naive": OWN,
        "bench.decode": OWN,
        "bench.pack": OWN,
        "bench.calibrate": OWN,
        "bench.start": "the article's benchmarks: initialisation, time to the first token, peak memory",
        "bench.share": "the article: processes that map the same file share its pages",
        "bench.arm": "the paper's evaluation: one run within a real memory limit",
        "bench.offload": "the paper's evaluation: tokens per second within a budget, arm by arm, compared with mmap",
    },
    "The labs": {
        "labs.regions": "neither original; the markers of minitorch",
        "labs.catalogue": OWN,
        "labs.workspace": "neither original; rustlings: one command, one open exercise, hints, progress",
        "labs.check": OWN,
        "labs.reporter": OWN,
        "labs.run": OWN,
    },
    "The command line": {
        "cli.main": OWN,
        "cli.ending": OWN,
        "cli.options": OWN,
        "cli.imported": OWN,
        "cli.terminal": OWN,
        "cli.table": OWN,
        "cli.pictures": OWN,
        "cli.show": OWN,
        "cli.prompt": OWN,
        "cli.generate": OWN,
        "cli.cache": "refinfer itself; LiteRT has no such commands",
        "cli.synth": OWN,
        "cli.planning": (
            "refinfer itself; the paper's artifact takes a memory size and a number of prefetch threads too"
        ),
        "cli.plan": OWN,
        "cli.simulate": OWN,
        "cli.machine": OWN,
        "cli.lab": OWN,
    },
}


@dataclass(frozen=True)
class Module:
    """What a module says of itself: its place, its docstring, its public names in their order in the source."""

    name: str
    docstring: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name as the book writes it: room/module."""
        return self.name.replace(".", "/")

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return re.split(r"(?<=\.)\s", self.docstring.replace("\n", " "), maxsplit=1)[0]

    @property
    def clauses(self) -> list[str]:
        """The clauses of its doorplate, ranges written out."""
        found = []
        for kind, first, last in re.findall(r"([A-Z]+)-(\d+)(?: to [A-Z]+-(\d+))?", self._doorplate):
            found += [f"{kind}-{number}" for number in range(int(first), int(last or first) + 1)]
        return found

    @property
    def tutorials(self) -> list[str]:
        """The tutorials of its doorplate, by the names of their files."""
        numbers = re.findall(r"(?<![-\d])\d\d\b", self._doorplate)
        return [path.name for path in TUTORIALS if path.name.partition("-")[0] in numbers]

    @property
    def tests(self) -> list[str]:
        """The file of tests that mirrors it; or those of its room that import it; or those that hold its clauses."""
        *room, module = self.name.split(".")
        for mirror in (f"test_{module}.py", f"test_{'_'.join([*room, module])}.py"):
            if (path := TESTS.joinpath(*room, mirror)).exists():
                return [path.relative_to(ROOT).as_posix()]
        parent = ".".join(["refinfer", *room])
        use = re.compile(rf"from {parent}\.{module} import |from {parent} import .*\b{module}\b")
        users = [path for path in TESTS.joinpath(*room).glob("test_*.py") if use.search(path.read_text())]
        marks = re.compile("|".join(rf'"{clause}"' for clause in self.clauses) or "(?!)")
        holders = [path for path in TESTS.rglob("test_*.py") if marks.search(path.read_text())]
        return sorted(path.relative_to(ROOT).as_posix() for path in users or holders)

    @property
    def _doorplate(self) -> str:
        """Where to read more: its tutorials and its clauses."""
        return " ".join(re.findall(r"\b(?:Read more|Spec|Tutorial): ([^.]*)\.", self.docstring))


def read_module(path: Path) -> Module:
    """Read one module without importing it."""
    tree = ast.parse(path.read_text())
    public: list[str] | None = None
    order: list[str] = []
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name("__all__")], value=value):
                public = ast.literal_eval(value)
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                order.append(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                order.append(name)
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    if public is None:  # a weight format: what its Protocol asks for, and more
        public = [each for each in order if not each.startswith("_")]
    return Module(name, ast.get_docstring(tree) or "", tuple(sorted(public, key=order.index)))


def modules() -> dict[str, Module]:
    """All modules with a page, by name, in reading order; an unknown or a missing one is an error.

    Raises:
        LookupError: `ORIGINS` and the package do not have the same modules.
    """
    paths = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    found = {module.name: module for module in map(read_module, paths)}
    order = [name for room in ORIGINS.values() for name in room]
    if set(order) != set(found):
        raise LookupError(f"ORIGINS and the package differ in {sorted(set(order) ^ set(found))}")
    return {name: found[name] for name in order}


def _title_of(tutorial: str) -> str:
    return (ROOT / "tutorials" / tutorial).read_text().partition("\n")[0].removeprefix("# ")


def page(module: Module, origin: str) -> str:
    """The page of one module."""
    up = "../" * (module.name.count(".") + 1)
    source = f"refinfer/{module.title}.py"
    clauses = ", ".join(f"[{clause}]({up}spec.md#{clause})" for clause in module.clauses)
    facts = {
        "Taught in": ", ".join(f"[{_title_of(name)}]({up}tutorials/{name})" for name in module.tutorials),
        "Clauses": clauses or "none of its own",
        "Tests": ", ".join(f"`{path}`" for path in module.tests) or "none of its own",
        "Comes from": origin.replace("BIBLIOGRAPHY", f"{up}bibliography.md"),
    }
    return "\n".join(
        [
            f"# {module.title} {{ #refinfer.{module.name} }}",
            "",
            in_the_repository(
                f"Source: [`{source}`]({up}../{source}). Its names, and what they do, are on the site only."
            ),
            *(f"- **{head}**: {text}." for head, text in facts.items()),
            "",
            f"::: refinfer.{module.name}",
            "    options:",
            "      members:",
            *(f"        - {name}" for name in module.names),
            "",
        ]
    )


def front_door() -> list[tuple[str, str]]:
    """What `import refinfer` gives: each name, and the module where it lives."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    return [
        (alias.name, node.module.removeprefix("refinfer."))
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("refinfer.")
        for alias in node.names
    ]


def index(known: dict[str, Module]) -> str:
    """The page of pages."""
    lines = [
        "# Reference",
        "",
        _INTRODUCTION,
    ]
    for room, names in ORIGINS.items():
        lines += ["", f"## {room}", ""]
        if room == "The front door":
            front = sorted(front_door(), key=lambda name_and_home: name_and_home[1] == "errors")
            links = [f"[`{name}`]({home.replace('.', '/')}.md#refinfer.{home}.{name})" for name, home in front]
            lines += [f"`import refinfer` gives {', '.join(links)} and `__version__`.", ""]
        lines += ["| module | what it is |", "|---|---|"]
        lines += [f"| [{known[name].title}]({known[name].title}.md) | {known[name].summary} |" for name in names]
    return "\n".join([*lines, ""])


def pages() -> dict[str, str]:
    """Every page by its path within `docs/reference`."""
    known = modules()
    origins = {name: origin for room in ORIGINS.values() for name, origin in room.items()}
    return {"index.md": index(known)} | {f"{m.title}.md": page(m, origins[m.name]) for m in known.values()}


def write_pages() -> None:
    """Write every page, and remove those of modules that are no more."""
    wanted = pages()
    for path in PAGES.rglob("*.md"):
        if path.relative_to(PAGES).as_posix() not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / name).write_text(text)


if __name__ == "__main__":
    write_pages()
    sys.exit()
