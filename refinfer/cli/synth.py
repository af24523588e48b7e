"""The command `synth`: write a checkpoint with random weights.

Leaves to others: shapes, what a checkpoint is made of (`model.synth`).
Read more: tutorial 07; clause CLI-6.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refinfer.cli.options import add_quiet, integer, nbytes
from refinfer.cli.show import progress_bar
from refinfer.cli.terminal import say, words_of
from refinfer.model.config import SHAPES
from refinfer.model.synth import DTYPES, checkpoint_nbytes, write_checkpoint
from refinfer.units import format_nbytes

__all__ = ["add_synth", "run_synth"]


def add_synth(parser: argparse.ArgumentParser) -> None:
    """Add the options of `refinfer synth`."""
    parser.set_defaults(run=run_synth)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--shape", metavar="NAME", required=True, choices=SHAPES, help=f"a published shape: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=DTYPES,
        default="bf16",
        help=f"type to store weights in: {', '.join(DTYPES)} (default: bf16)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=integer(0), default=0, help="random seed for the weights (default: 0)"
    )
    parser.add_argument(
        "--shard-size",
        metavar="BYTES",
        type=nbytes,
        help="largest size of a file, such as 2GB (default: one file for all weights)",
    )
    add_quiet(parser, "print nothing, and show no progress bar")


def run_synth(args: argparse.Namespace) -> None:
    """Run `refinfer synth`."""
    config = SHAPES[args.shape]
    total = checkpoint_nbytes(config, args.dtype)
    with progress_bar(f"writing {args.folder}", total, quiet=args.quiet) as advance:
        write_checkpoint(
            args.folder, config, dtype=args.dtype, seed=args.seed, shard_nbytes=args.shard_size, progress=advance
        )
    if args.quiet:
        return
    about = f"{args.shape}, {config.n_parameters:,} parameters, {format_nbytes(total)} in {args.dtype}"
    say([f"{args.folder}:", *words_of(about)], sys.stderr)
