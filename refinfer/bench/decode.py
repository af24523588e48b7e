"""`refinfer bench decode`: tokens per second of the whole model, against a clean naive decode of the same weights.

Leaves to others: the naive decode (`naive`), files that are kept; its checkpoints are temporary.
Read more: tutorial 02; clause BENCH-4.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from threadpoolctl import threadpool_limits

from refinfer.bench.entry import Bench, Progress, Row, quartiles
from refinfer.bench.harness import Timings, interleave
from refinfer.bench.naive import NaiveDecoder
from refinfer.errors import GenerationError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.synth import write_checkpoint
from refinfer.model.transformer import Transformer
from refinfer.model.weights import RowMajorSource

__all__ = ["BENCH", "DECODE_SHAPES", "decode_rows"]


def _bench_shape(hidden_size: int, num_hidden_layers: int, intermediate_size: int, heads: int) -> ModelConfig:
    return replace(
        SHAPES["tiny"],
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
    )


DECODE_SHAPES: Final = (_bench_shape(64, 4, 172, 4), _bench_shape(128, 6, 344, 4), SHAPES["stories15m"])
_PROMPT_TOKENS: Final = 88
_STEPS: Final = 8
_LARGEST_DIFFERENCE: Final = 1e-3


def decode_rows(rounds: int = 41, progress: Progress = lambda: None) -> Iterator[Row]:
    """Yield a row for each shape: ratio to the naive decode, and tokens per second; one BLAS thread.

    In its turn, a candidate computes eight tokens at positions 88 to 95, after the same prompt.

    Raises:
        GenerationError: the two decoders do not agree; nothing is timed.
    """
    rng = np.random.default_rng(0)
    for config in DECODE_SHAPES:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, threadpool_limits(1, user_api="blas"):
            write_checkpoint(Path(folder), config, dtype="f32")
            source = RowMajorSource(config, open_checkpoint(Path(folder)))
            ids = rng.integers(config.vocab_size, size=_PROMPT_TOKENS + _STEPS).tolist()
            yield _measure(source, ids, rounds)
            progress()


def _measure(source: RowMajorSource, ids: list[int], rounds: int) -> Row:
    with source.forward_pass() as weights:
        naive = NaiveDecoder(source.config, weights, len(ids))
    ours = Transformer(source, len(ids))
    ours.prefill(ids[:_PROMPT_TOKENS])
    for i in ids[:_PROMPT_TOKENS]:
        naive.decode(i)

    def run_naive() -> list[Any]:
        naive.length = _PROMPT_TOKENS
        return [naive.decode(i) for i in ids[_PROMPT_TOKENS:]]

    def run_ours() -> list[Any]:
        ours.kv_cache.rewind(_PROMPT_TOKENS)
        return [ours.decode([i])[0] for i in ids[_PROMPT_TOKENS:]]

    difference = float(np.abs(np.array(run_naive()) - np.array(run_ours())).max())
    if not difference < _LARGEST_DIFFERENCE:
        raise GenerationError(f"the two decoders differ by {difference}: there is nothing to compare")
    # Small models get more rounds in the same time: their turns are short, and noise weighs more.
    turns = rounds * max(1, 2_000_000 // source.config.n_parameters)
    return _row(source.config, interleave({"naive": run_naive, "refinfer": run_ours}, turns), difference)


def _row(config: ModelConfig, timings: Timings, difference: float) -> Row:
    low, high = timings.spread("refinfer", "naive")
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "ratio_to_naive": round(timings.ratio("refinfer", "naive"), 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "tokens_per_s": round(_STEPS / timings.median("refinfer"), 1),
        "naive_tokens_per_s": round(_STEPS / timings.median("naive"), 1),
        "largest_difference": difference,
    }


BENCH: Final = Bench(
    summary="Measure whole models against a clean naive decode.",
    title="Decode, one BLAS thread, against a clean naive numpy decode",
    steps=lambda: len(DECODE_SHAPES),
    measure=lambda progress: {"rows": list(decode_rows(progress=progress))},
    columns={
        "hidden size x layers": lambda row: f"{row['hidden_size']} x {row['num_hidden_layers']}",
        "times as fast": lambda row: f"{row['ratio_to_naive']:.2f}",
        "quartiles": quartiles,
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "naive tokens/s": lambda row: f"{row['naive_tokens_per_s']:,.0f}",
    },
    notes={"naive": "the same weights and logits, in straightforward code that makes new arrays at each step"},
)
