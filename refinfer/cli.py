"""The command line: options in, text or one JSON object out, one clear line when something is wrong.

Knows: argparse, terminals, exit statuses. Does not know: how anything is done; each command calls its room.
Spec: CLI-1 to CLI-9. Tutorial: 00.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NoReturn

from refinfer import __version__
from refinfer.engine import CacheUse, Prediction, WeightCacheStats, stats_of
from refinfer.errors import InputError, RefinferError, RequestError
from refinfer.generate import DEFAULT_PROMPT, STORYTELLER, GenerationStats, load
from refinfer.model.config import SHAPES
from refinfer.model.folder import DEFAULT_MAX_TOKENS, open_folder
from refinfer.model.synth import DTYPES, checkpoint_nbytes, write_checkpoint
from refinfer.offload.cost import DEVICES
from refinfer.offload.plan import PLANS
from refinfer.offload.prefetch import PREFETCH_THREADS
from refinfer.packing.formats import FORMATS
from refinfer.process import format_nbytes, parse_nbytes
from refinfer.trace import RealClock, to_chrome
from refinfer.weight_cache.load_or_build import Listener
from refinfer.weight_cache.mapped_file import NO_FILE

__all__ = ["main"]

_BENCHES: Final = (
    "calibrate",
    "decode",
    "matmul",
    "offload",
    "pack",
    "start",
    "share",
)  # a test holds them to `bench.report.BENCHES`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a failure while running, 2 for bad input, 130 for Ctrl-C."""
    _mend_streams()
    try:
        args = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
        sys.stdout.flush()
    except RefinferError as error:
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _complain("there is not enough memory for this; use a smaller model or fewer tokens", 1)
    except OSError as error:
        return _complain(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    return 0


def _mend_streams() -> None:
    """Make the standard streams usable: closed ones swallow, and characters a terminal lacks become '?'."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  (open until the program ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _complain(message: str, status: int) -> int:
    one_line = re.sub(r"\s+", " ", message)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"refinfer: {one_line}\n")
    return status


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="refinfer",
        description="Weight caches and weight offloading for language models, in readable numpy.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"refinfer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    generate = command("generate", _generate, "Generate text behind a prompt.")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help=f"the text to go on from ({DEFAULT_PROMPT!r})")
    generate.add_argument("--model", metavar="DIR", help="a model folder in Hugging Face's form (the storyteller)")
    generate.add_argument(
        "--weights",
        choices=("auto", *FORMATS),
        default="auto",
        help="the format to pack weights in (auto: bf16 for bfloat16 checkpoints, else f32)",
    )
    generate.add_argument(
        "--weight-cache",
        metavar="PATH|:memory|off",
        help="the file of packed weights (in the user's cache directory); :memory packs at each start; "
        "off multiplies row-major weights, nothing packed",
    )
    generate.add_argument(
        "--budget", metavar="B", help="run in so much memory: 300MB, 1.5GiB, 40%% of the packed weights, or auto"
    )
    generate.add_argument("--plan", choices=tuple(PLANS), help="what stays in memory under a budget (optimal)")
    generate.add_argument("--prefetch-threads", metavar="N", type=_integer(0, 64), help="that read ahead; 0: none (2)")
    generate.add_argument("--prefetch-ring", metavar="BYTES", type=_nbytes, help="they read into (the plan chooses)")
    generate.add_argument("--disk-bandwidth", metavar="RATE", type=_rate, help="read no faster than this, as 300MB/s")
    generate.add_argument("--trace", metavar="FILE", help="write what was read, computed and waited for: for Perfetto")
    generate.add_argument("--token-ids", metavar="1,2,3", type=_token_ids, help="the prompt as token ids")
    generate.add_argument(
        "--max-tokens", metavar="N", type=_integer(1), help=f"stop after N tokens ({DEFAULT_MAX_TOKENS}, if they fit)"
    )
    generate.add_argument(
        "--temperature", metavar="T", type=_number, default=0.0, help="0 is greedy, 1 the model's own distribution (0)"
    )
    generate.add_argument("--top-k", metavar="K", type=_integer(1), help="draw from the K likeliest, at a temperature")
    generate.add_argument("--top-p", metavar="P", type=_number, help="draw from the likeliest that hold a share P")
    generate.add_argument("--seed", metavar="S", type=_integer(0), help="of the draws (a different one each time)")
    generate.add_argument("--threads", metavar="N", type=_integer(1), help="BLAS threads (by the model's size)")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    synth = command("synth", _synth, "Write a checkpoint with random weights, in Hugging Face's form.")
    synth.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    synth.add_argument("--shape", metavar="NAME", required=True, choices=SHAPES, help=", ".join(SHAPES))
    synth.add_argument("--dtype", choices=DTYPES, default="bf16", help="the stored type (bf16)")
    synth.add_argument("--seed", metavar="S", type=_integer(0), default=0, help="of the weights (0)")
    synth.add_argument("--shard-size", metavar="BYTES", type=_nbytes, help="split into files of at most this, as 2GB")

    pack = command("pack", _pack, "Pack a model's weights into its cache file, if they are not there yet.")
    pack.add_argument("folder", metavar="MODEL", nargs="?", type=Path, default=STORYTELLER, help="(the storyteller)")
    pack.add_argument("--weights", choices=("auto", *FORMATS), default="auto", help="the format to pack weights in")
    pack.add_argument("-o", "--output", metavar="FILE", help="the file (in the user's cache directory)")
    pack.add_argument("--json", action="store_true", help="print one JSON object")

    cache = command("cache", _cache, "Look after the cache files.")
    actions = cache.add_subparsers(metavar="ACTION", required=True, dest="action", parser_class=_Parser)
    for name, text in (
        ("list", "Show all cache files, or those of some models."),
        ("info", "Show what is in a cache file."),
        ("verify", "Read cache files whole and check every byte."),
        ("rm", "Remove cache files."),
        ("path", "Print the cache directory, or where a model's file lies."),
    ):
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument("target", metavar="FILE|MODEL", nargs="*", help="a cache file, its name, or a model folder")
        action.add_argument("--weights", choices=("auto", *FORMATS), help="of a model: this format only")
        action.add_argument("--all", action="store_true", help="all files in the cache directory")
        action.add_argument("--json", action="store_true", help="print JSON")

    for name, run, text in (
        ("plan", _plan, "Show what a memory budget would be spent on; no weights are needed."),
        ("simulate", _simulate, "Show what a memory budget would lead to, on a virtual clock; no weights are needed."),
    ):
        _add_planning(command(name, run, text), paper=name == "simulate")

    doctor = command("doctor", _doctor, "Say what this machine is and what it can show.")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    bench = command("bench", _bench, "Measure, interleaved, and print medians.")
    bench.add_argument("name", metavar="NAME", choices=_BENCHES, help=", ".join(_BENCHES))
    bench.add_argument("--quick", action="store_true", help="offload: one budget, one format, two rounds")
    bench.add_argument("--compute-heavy", action="store_true", help="offload: products take as long as reads")
    bench.add_argument("--json", action="store_true", help="print one JSON object, row by row")
    return parser


def _add_planning(parser: argparse.ArgumentParser, *, paper: bool) -> None:
    parser.add_argument("--model", metavar="DIR", help="a model folder in Hugging Face's form")
    parser.add_argument("--shape", metavar="NAME", choices=SHAPES, help=f"or a published shape: {', '.join(SHAPES)}")
    parser.add_argument("--weights", choices=("auto", *FORMATS), default="auto", help="the format (a shape's: bf16)")
    parser.add_argument("--budget", metavar="B", help="300MB, 1.5GiB, 40%% of the packed weights, or auto (50%%)")
    parser.add_argument("--positions", metavar="N", type=_integer(1), help="that the KV cache has room for (512)")
    parser.add_argument("--plan", choices=PLANS, default="optimal", help="the plan to look at (optimal)")
    parser.add_argument("--prefetch-threads", metavar="N", type=_integer(0, 64), default=1, help="that read ahead (1)")
    parser.add_argument("--prefetch-ring", metavar="BYTES", type=_nbytes, help="they read into (by the budget)")
    parser.add_argument("--device", metavar="NAME", choices=DEVICES, help=f"the disk: {', '.join(DEVICES)}")
    parser.add_argument("--svg", metavar="FILE", help="draw a picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if paper:
        parser.add_argument("--paper", action="store_true", help="FlexInfer's own experiment, beside its figures")


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text[:20]}")
        return value

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _nbytes(text: str) -> int:
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> int:
    return _nbytes(text.strip().removesuffix("/s"))


def _generate(args: argparse.Namespace) -> None:
    clock = RealClock()
    started = clock.now()
    if args.prompt is not None and args.token_ids is not None:
        raise RequestError("give either a prompt or --token-ids, not both")
    streaming = (args.plan, args.prefetch_threads, args.prefetch_ring, args.disk_bandwidth, args.trace)
    if args.budget is None and any(option is not None for option in streaming):
        raise RequestError(
            "--plan, --prefetch-threads, --prefetch-ring, --disk-bandwidth and --trace are for a --budget; give one"
        )
    model = open_folder(Path(args.model or STORYTELLER))
    prompt = DEFAULT_PROMPT if args.prompt is None and args.token_ids is None else args.prompt
    ids = args.token_ids if prompt is None else model.encode(prompt)
    max_tokens = model.plan_request(ids, args.max_tokens)
    with _packing() as listener:
        session = load(
            model,
            weights=args.weights,
            budget=args.budget,
            plan=args.plan or "optimal",
            prefetch_threads=PREFETCH_THREADS if args.prefetch_threads is None else args.prefetch_threads,
            prefetch_ring=args.prefetch_ring,
            disk_bandwidth=args.disk_bandwidth,
            trace=args.trace is not None,
            weight_cache=args.weight_cache,
            max_positions=len(ids) + max_tokens,
            threads=args.threads,
            clock=clock,
            started=started,
            listener=listener,
        )
    with session:
        pieces = session.generate(
            token_ids=ids,
            max_tokens=max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        if not args.json:
            sys.stdout.write(prompt or "")
            sys.stdout.flush()  # the first token may be a while
        try:
            for piece in pieces:
                if not args.json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                print()  # what comes next begins on a line of its own
            raise
        if args.trace is not None:
            from refinfer.cli_offload import write_file

            write_file(args.trace, json.dumps(to_chrome(session.trace)))
        stats, prediction = session.stats, session.prediction
        cache = _weight_cache_line(session.weight_cache, session.cache_use, mapped=args.budget is None)
    assert stats is not None
    if args.json:
        print(json.dumps(stats.to_json()))
        return
    print("" if model.tokenizer else ",".join(map(str, stats.token_ids)))
    sys.stdout.flush()
    print(_summary(stats), cache, *_offload_lines(stats, prediction), sep="\n", file=sys.stderr)


def _summary(stats: GenerationStats) -> str:
    """One line that a person likes to read."""
    n = len(stats.token_ids)
    parts = [
        f"{n} token{'s' if n != 1 else ''}{' (the model ended the text)' if stats.finish_reason == 'stop' else ''}",
        f"first after {_seconds(stats.time_to_first_token_s)}",
    ]
    if stats.tokens_per_s is not None:
        parts.append(f"then {_rate_of(stats.tokens_per_s)} tokens/s")
    if stats.peak_rss_bytes is not None:
        parts.append(f"peak memory {format_nbytes(stats.peak_rss_bytes)}")
    return "\n" + " · ".join(parts)


def _weight_cache_line(stats: WeightCacheStats, use: CacheUse, *, mapped: bool = True) -> str:
    """Say what the weight cache did, and why."""
    packed = f"packed {_buffers(use.misses)}, {format_nbytes(stats.packed_bytes)}"
    took = _seconds(stats.load_or_build_s)
    if stats.state == "off":
        line = "off: nothing was packed"
    elif stats.state == "memory":
        line = f"{packed}, into memory in {took}" + (f": {stats.reason}" if stats.reason else "")
    elif stats.state == "built":
        why = "" if stats.reason == NO_FILE else f"rebuilt: {stats.reason}; "
        kept = f", found {_buffers(use.hits)}" if use.hits else ""
        line = f"{why}{packed}{kept}, in {took}; the next start will {'map' if mapped else 'find'} them"
    else:
        saved = f"; packing took {_seconds(use.packing_s)}" if use.packing_s is not None else ""
        line = f"{'mapped' if mapped else 'found'} {_buffers(use.hits)}, {format_nbytes(use.nbytes)}, in {took}{saved}"
    return f"weight cache: {line}"


def _buffers(n: int) -> str:
    return f"{n} buffer{'s' if n != 1 else ''}"


def _offload_lines(done: GenerationStats, prediction: Prediction | None) -> list[str]:
    """Say where a budget went, what was read, and how that compares with what disk and processor allow."""
    stats = done.offload
    if stats is None or prediction is None:
        return []
    parts = {
        "locked": stats.locked_bytes,
        "norms and biases": stats.resident_bytes,
        "ring": stats.ring_bytes,
        "KV cache": stats.kv_cache_bytes,
        "scratch": stats.scratch_bytes,
    }
    spent = ", ".join(f"{what} {format_nbytes(nbytes)}" for what, nbytes in parts.items())
    rates = [
        f"predicted {_rate_of(stats.predicted_tokens_per_s)}",
        *([f"measured {_rate_of(done.tokens_per_s)}"] if done.tokens_per_s is not None else []),
        f"ideal {_rate_of(stats.ideal_tokens_per_s)}",
    ]
    known = "as measured here" if prediction.calibration.measured else "as assumed: run refinfer bench calibrate"
    return [
        f"budget: {format_nbytes(stats.budget_bytes)}, at most {format_nbytes(stats.peak_bytes)} in use: {spent}",
        (
            f"plan {stats.plan}: {format_nbytes(stats.streamed_bytes_per_token)} read for each token, "
            f"{format_nbytes(stats.read_bytes_total)} in all; "
            f"waited {_seconds(stats.wait_s)} for it, computed {_seconds(stats.compute_s)}"
        ),
        f"tokens/s: {', '.join(rates)} (disk and processor {known})",
    ]


def _rate_of(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _pack(args: argparse.Namespace) -> None:
    from refinfer.cli_cache import pack

    clock = RealClock()
    started = clock.now()
    with _packing() as listener:
        prepared = pack(args.folder, args.weights, args.output, listener)
    stats, use = stats_of(prepared, clock.now() - started)
    if args.json:
        print(json.dumps(asdict(stats)))
    else:
        print(stats.path)
        sys.stdout.flush()
        print(_weight_cache_line(stats, use), file=sys.stderr)


def _cache(args: argparse.Namespace) -> None:
    from refinfer.cli_cache import run_cache

    run_cache(args)


def _plan(args: argparse.Namespace) -> None:
    from refinfer.cli_offload import run_plan

    run_plan(args)


def _simulate(args: argparse.Namespace) -> None:
    from refinfer.cli_offload import run_simulate

    run_simulate(args)


def _synth(args: argparse.Namespace) -> None:
    config = SHAPES[args.shape]
    nbytes = checkpoint_nbytes(config, args.dtype)
    with _progress(f"writing {args.folder}", nbytes) as advance:
        write_checkpoint(
            args.folder, config, dtype=args.dtype, seed=args.seed, shard_nbytes=args.shard_size, progress=advance
        )
    print(
        f"{args.folder}: {args.shape}, {config.n_parameters:,} parameters, {format_nbytes(nbytes)} in {args.dtype}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _packing() -> Iterator[Listener]:
    """Show on a terminal how packing goes; warnings and waiting are told in a pipe too."""

    def tell(message: str) -> None:
        print(f"refinfer: {message}", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        advance: list[Callable[[int], None]] = []

        def progress(nbytes: int) -> None:
            if not advance:  # nothing is shown unless there is something to wait for
                advance.append(stack.enter_context(_progress("packing the weights", None)))
            advance[0](nbytes)

        yield Listener(
            progress=progress,
            on_wait=lambda: tell("waiting for another process that is packing the same weights"),
            warn=lambda message: tell(f"warning: {message}"),
        )


@contextlib.contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


def _doctor(args: argparse.Namespace) -> None:
    from refinfer.bench.machine import describe_machine
    from refinfer.bench.report import print_machine

    machine = describe_machine(Path.cwd())
    if args.json:
        print(json.dumps(machine))
    else:
        print_machine(machine)


def _bench(args: argparse.Namespace) -> None:
    from refinfer.bench.machine import describe_machine
    from refinfer.bench.report import bench_of, print_bench

    bench = bench_of(args.name, quick=args.quick, compute_heavy=args.compute_heavy)
    machine = describe_machine(Path.cwd())
    with _progress("measuring", bench.steps) as advance:
        result = bench.measure(lambda: advance(1))
        if args.json:
            _print_row_by_row({"machine": machine} | result)
        else:
            result["rows"] = list(result["rows"])
    if not args.json:
        print_bench(bench, result, machine)


def _print_row_by_row(result: dict[str, Any]) -> None:
    """Print one JSON object whose `rows`, last, are written as they come."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})
    sys.stdout.write(f'{head[:-1]}, "rows": [')
    for i, row in enumerate(result["rows"]):
        sys.stdout.write(("," if i else "") + "\n" + json.dumps(row))
        sys.stdout.flush()
    print("\n]}")
