"""The command `generate`: a prompt in, a text out, and a summary of the run.

Defines the options, and prints text and figures. Leaves to others: where the prompt comes from (`prompt`), how the
checkpoint wants tokens to be chosen (`generation_config`), generating (`generate`), the weight cache's line (`show`).
Read more: tutorials 00, 12; clauses CLI-1, CLI-2, CLI-32, CLI-33, CLI-37.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from typing import Final

from refinfer.cli.options import (
    MODEL,
    add_json,
    add_plan_choice,
    add_prefetch,
    add_quiet,
    add_weights,
    integer,
    number,
    rate,
    token_ids,
)
from refinfer.cli.pictures import CHROME_BEGINS, to_chrome
from refinfer.cli.prompt import add_prompt, prompt_of, require_one_prompt
from refinfer.cli.show import cache_line, format_seconds, listening, require_writable, write_file
from refinfer.cli.terminal import native_code_unheard, say
from refinfer.clock import Clock, RealClock
from refinfer.errors import RequestError
from refinfer.generate import STORYTELLER, GenerationStats, Session, load
from refinfer.model.folder import DEFAULT_MAX_TOKENS, DEFAULT_POSITIONS, ModelFolder, open_folder
from refinfer.model.generation_config import GenerationConfig, read_generation_config
from refinfer.model.sampler import Sampling
from refinfer.model.synth import has_random_weights
from refinfer.planning.cost import PREFETCH_THREADS
from refinfer.units import format_nbytes

__all__ = ["add_generate", "run_generate"]

_MOST_SEEDS: Final = 1_000_000  # few digits, to type again


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `refinfer generate`."""
    parser.set_defaults(run=run_generate)
    add_prompt(parser)
    parser.add_argument("--model", metavar="DIR", help=f"{MODEL} (default: the storyteller)")
    add_weights(parser, "auto, which is bf16 for bfloat16 checkpoints and f32 for others")
    parser.add_argument(
        "--weight-cache",
        metavar="FILE",
        help="file of packed weights; or :memory, to pack into memory at each start; or off, to pack nothing and "
        "multiply row-major weights (default: a file in the user's cache directory)",
    )
    _add_budget(parser)
    parser.add_argument("--token-ids", metavar="IDS", type=token_ids, help="the prompt as token ids, such as 1,2,3")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=integer(1),
        help=f"largest number of tokens to generate (default: {DEFAULT_MAX_TOKENS}, or as many as fit if that is less)",
    )
    _add_sampling(parser)
    _add_chat(parser)
    parser.add_argument(
        "--threads", metavar="N", type=integer(1), help="number of BLAS threads (default: chosen by the model's size)"
    )
    add_json(parser, "print one JSON object instead of text")
    add_quiet(parser, "print the text alone, without a summary and without a progress bar")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        metavar="B",
        help="run within this much memory: 300MB, 1.5GiB, 40%% of the packed weights, or auto, which is nine tenths of "
        "what is left (default: no limit)",
    )
    add_plan_choice(parser, "which weights stay in memory within a budget", default=None)
    add_prefetch(parser, default=None)
    parser.add_argument(
        "--disk-bandwidth",
        metavar="RATE",
        type=rate,
        help="read no faster than this, such as 300MB/s (default: as fast as the disk)",
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="write what was read, computed and waited for into this file, for Perfetto"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=number,
        help="sampling temperature: 0 always takes the likeliest token, 1 draws from the model's own distribution "
        "(default: as the model's generation_config.json asks, or else 0)",
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=integer(0),
        help="draw from the K likeliest tokens; 0 draws from all "
        "(default: as the model's generation_config.json asks, or else 50)",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=number,
        help="draw from the likeliest tokens that together have probability P "
        "(default: as the model's generation_config.json asks, or else 1)",
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=integer(0),
        help="random seed for sampling (default: a different one each run, which the summary prints)",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask a model that was taught to chat: put the prompt into its chat template, and print the answer only; a "
        "model that can think before it answers does so",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model, ahead of the prompt of --chat")


def run_generate(args: argparse.Namespace) -> None:
    """Run `refinfer generate`."""
    clock = RealClock()
    started = clock.now()
    _require_consistent(args)
    with native_code_unheard():
        model = open_folder(args.model or STORYTELLER)
    config = read_generation_config(model.path)
    sampling, seed = _sampling_and_seed(args, config)
    prompt = prompt_of(args)
    with native_code_unheard():
        ids = args.token_ids if prompt is None else _encode(model, args, prompt, clock)
        model = model.ending_turns() if args.chat else model
    max_tokens = model.plan_request(ids, args.max_tokens)
    _warn_of_what_is_not_applied(config, sampling)
    if not args.quiet and prompt is not None and not args.chat and model.has_chat_template:
        say("hint: this model was taught to chat; --chat puts the prompt into its chat template", sys.stderr)
    with _load(args, model, _positions(args, model, len(ids) + max_tokens), clock, started) as session:
        pieces = session.generate(token_ids=ids, max_tokens=max_tokens, seed=seed, **asdict(sampling))
        _write(chain(["" if args.chat else prompt or ""], pieces), heard=not args.json)
        if args.trace is not None:
            write_file(args.trace, CHROME_BEGINS, json.dumps(to_chrome(session.trace)))
        stats = session.stats
        cache = cache_line(session.weight_cache, mapped=args.budget is None)
    assert stats is not None
    if args.json:
        print(json.dumps(stats.to_json() | {"sampling": asdict(sampling) | {"seed": seed}}))
        return
    print("" if model.tokenizer else ",".join(map(str, stats.token_ids)))
    sys.stdout.flush()
    if args.quiet:
        return
    print(file=sys.stderr)
    noise = ["this model has random weights, so its text is noise"] if has_random_weights(model.path) else []
    drawn = seed if args.seed is None else None
    for line in (_summary(stats, drawn), *noise, cache, *_offload_lines(stats)):
        say(line, sys.stderr)


def _positions(args: argparse.Namespace, model: ModelFolder, least: int) -> int:
    """Return how many positions to reserve: within a budget, as many as `plan` and `simulate` plan for, if not told."""
    if args.budget is None or args.max_tokens is not None:
        return least
    return max(least, min(DEFAULT_POSITIONS, model.config.longest_request))


def _encode(model: ModelFolder, args: argparse.Namespace, prompt: str, clock: RealClock) -> list[int]:
    return model.encode_chat(prompt, args.system, clock.local_time) if args.chat else model.encode(prompt)


def _require_consistent(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        RequestError: two prompts, an option of a budget or a chat without it, or a trace that cannot be written there.
    """
    require_one_prompt(args)
    if args.chat and args.prompt is None and args.prompt_file is None:
        raise RequestError("--chat needs a prompt: give the question as text")
    if args.system is not None and not args.chat:
        raise RequestError("--system can be used only in a chat; give --chat too")
    streaming = ("plan", "prefetch_threads", "prefetch_ring", "disk_bandwidth", "trace")
    given = [f"--{name.replace('_', '-')}" for name in streaming if getattr(args, name) is not None]
    if args.budget is None and given:
        raise RequestError(f"{' and '.join(given)} can be used only within a budget; give --budget too")
    if args.trace is not None:
        require_writable(args.trace, CHROME_BEGINS)  # now, and not only when the text has been written


def _sampling_and_seed(args: argparse.Namespace, config: GenerationConfig) -> tuple[Sampling, int | None]:
    """Return how tokens are chosen, and the random seed if they are drawn.

    Raises:
        RequestError: an option of drawing is given, but the likeliest token is always taken.
    """
    sampling = config.sampling(args.temperature, args.top_k, args.top_p)
    if sampling.temperature > 0:
        return sampling, secrets.randbelow(_MOST_SEEDS) if args.seed is None else args.seed
    given = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "seed") if getattr(args, name) is not None]
    if given:
        raise RequestError(
            f"{' and '.join(given)} would change nothing, because the likeliest token is always taken here; "
            "give a --temperature above 0 too"
        )
    return sampling, None


def _warn_of_what_is_not_applied(config: GenerationConfig, sampling: Sampling) -> None:
    if missing := config.not_applied(sampling):
        print(f"refinfer: warning: {config.where} asks for {' and '.join(missing)}, not applied here", file=sys.stderr)


def _load(args: argparse.Namespace, model: ModelFolder, max_positions: int, clock: Clock, started: float) -> Session:
    with listening(quiet=args.quiet) as listener:
        return load(
            model,
            weights=args.weights,
            budget=args.budget,
            plan=args.plan or "optimal",
            prefetch_threads=PREFETCH_THREADS if args.prefetch_threads is None else args.prefetch_threads,
            prefetch_ring=args.prefetch_ring,
            disk_bandwidth=args.disk_bandwidth,
            trace=args.trace is not None,
            weight_cache=args.weight_cache,
            max_positions=max_positions,
            threads=args.threads,
            clock=clock,
            started=started,
            listener=listener,
        )


def _write(pieces: Iterable[str], *, heard: bool) -> None:
    """Take the pieces of the text as they come, and print them if they are to be heard."""
    try:
        for piece in pieces:
            if heard:
                sys.stdout.write(piece)
                sys.stdout.flush()  # the next token may be a while
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print()  # what comes next begins on a line of its own
        raise


def _summary(stats: GenerationStats, drawn_seed: int | None) -> str:
    """Return one line that sums up a generation; it has the seed if that was not the user's choice."""
    n = len(stats.token_ids)
    parts = [
        f"{n} token{'s' if n != 1 else ''}{' (the model ended the text)' if stats.finish_reason == 'stop' else ''}",
        f"first after {format_seconds(stats.time_to_first_token_s)}",
    ]
    if stats.tokens_per_s is not None:
        parts.append(f"then {_rate(stats.tokens_per_s)} tokens/s")
    if stats.peak_rss_bytes is not None:
        parts.append(f"peak memory {format_nbytes(stats.peak_rss_bytes)}")
    if drawn_seed is not None:
        parts.append(f"seed {drawn_seed}")
    return " · ".join(parts)


def _offload_lines(done: GenerationStats) -> list[str]:
    """Return where a budget went, what was read, and how that compares with what disk and processor allow."""
    stats = done.offload
    if stats is None:
        return []
    spent = ", ".join(f"{what} {format_nbytes(nbytes)}" for what, nbytes in stats.account.parts.items())
    measured = {
        "after 8 tokens": stats.estimated_tokens_per_s,
        "measured": done.tokens_per_s,
        "ideal": stats.ideal_tokens_per_s,
    }
    rates = [f"{name} {_rate(rate)}" for name, rate in measured.items() if rate is not None]
    predicted = _rate(stats.predicted_tokens_per_s)
    if (likely := stats.predicted_range_tokens_per_s) is not None:
        rates.insert(0, f"predicted {predicted} ({' to '.join(map(_rate, likely))})")
    else:
        assumed = f"the {' and the '.join(stats.assumed)} {'are' if len(stats.assumed) > 1 else 'is'} as assumed"
        rates.insert(0, f"{predicted} if {assumed} (run refinfer bench calibrate)")
    return [
        f"budget: {format_nbytes(stats.account.budget)}, peak {format_nbytes(stats.peak_bytes)}: {spent}",
        (
            f"plan {stats.plan}: {format_nbytes(stats.streamed_bytes_per_token)} streamed per token, "
            f"{format_nbytes(stats.read_bytes_total)} read in total; "
            f"waited {format_seconds(stats.wait_s)} for it, computed {format_seconds(stats.compute_s)}"
        ),
        f"tokens/s: {', '.join(rates)}",
    ]


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"
