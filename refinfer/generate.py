"""Generating text: a session over a loaded model.

Knows: prompts, sampling, texts, when a damaged cache is rebuilt. Does not know: how weights become a transformer
(`engine`), options as strings, terminals, JSON text.
Spec: GEN-1 to GEN-11, GEN-16, GEN-17. Tutorial: 00.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from refinfer.arrays import Float32Array, IntArray
from refinfer.engine import (
    CacheUse,
    Engine,
    EngineRequest,
    OffloadStats,
    Prediction,
    Streaming,
    WeightCacheStats,
    open_engine,
    require_finite_weights,
)
from refinfer.errors import DamagedWeightsError, GenerationError, RequestError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.folder import ModelFolder, open_folder
from refinfer.model.sampler import Sampling, sample
from refinfer.model.tokenizer import TextStream
from refinfer.model.transformer import Transformer
from refinfer.offload.plan import PLANS
from refinfer.offload.prefetch import PREFETCH_THREADS
from refinfer.prepare import IN_MEMORY
from refinfer.process import peak_rss_bytes, usable_cores
from refinfer.trace import Clock, RealClock, Trace
from refinfer.weight_cache.load_or_build import Listener

__all__ = [
    "DEFAULT_MAX_POSITIONS",
    "DEFAULT_PROMPT",
    "STORYTELLER",
    "GenerationStats",
    "Session",
    "default_threads",
    "load",
]

STORYTELLER: Final = Path(__file__).parent / "storyteller"
"""The folder of the small trained model that ships with the package."""

_Result = TypeVar("_Result")

DEFAULT_PROMPT: Final = "ROMEO:"
DEFAULT_MAX_POSITIONS: Final = 512
_BLAS_THREADS_PAY_FROM_BYTES: Final = 64 << 20
_MOST_THREADS: Final = 1024


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one generation did; the fields of the command line's JSON, in its order.

    `time_to_first_token_s` is the time to load the model and to reach the first token; for a session's later
    generations, to reach it alone. `tokens_per_s` counts the tokens after the first over the time spent on them; None
    for a single token. `peak_rss_bytes` is None where the system does not tell.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    time_to_first_token_s: float
    tokens_per_s: float | None
    peak_rss_bytes: int | None
    weight_cache: WeightCacheStats | None = None
    offload: OffloadStats | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `refinfer generate --json` prints."""
        return asdict(self)


def load(
    model: str | os.PathLike[str] | ModelFolder | None = None,
    *,
    weights: str = "auto",
    budget: int | str | None = None,
    plan: str = "optimal",
    prefetch_threads: int = PREFETCH_THREADS,
    prefetch_ring: int | None = None,
    disk_bandwidth: float | None = None,
    paged: bool = False,
    trace: bool = False,
    weight_cache: str | os.PathLike[str] | None = None,
    max_positions: int | None = None,
    threads: int | None = None,
    lock_memory: bool = False,
    verify: bool = True,
    clock: Clock | None = None,
    started: float | None = None,
    listener: Listener | None = None,
) -> Session:
    """Load a model and make it ready to generate.

    Args:
        model: a folder in Hugging Face's form, or what `open_folder` returned; None means the storyteller.
        weights: the format to pack weights in: f32, bf16, int8, int4, or auto: bf16 where the checkpoint is stored
            so, else f32; nothing is lost.
        budget: run in so much memory: bytes, a size such as "300MB", or a share of the packed weights such as "40%".
        plan: which chunks stay in memory under a budget: one of `offload.plan.PLANS`.
        prefetch_threads: how many threads read ahead; 0 reads each chunk when it is needed.
        prefetch_ring: bytes of the ring that they read into; None lets the plan choose.
        disk_bandwidth: read no faster than so many bytes per second.
        paged: keep an LRU page cache instead of locks and a ring, as mmap would.
        trace: keep what is read, computed and waited for, for `Session.trace`.
        weight_cache: the file to keep packed weights in; None means one in the user's cache directory. ":memory"
            packs at each start. "off" packs nothing: row-major float32 weights with the same values, multiplied by
            numpy as a whole; an oracle.
        max_positions: how many positions, prompt and generated tokens together, the KV cache reserves;
            None means 512, or as many as the model has.
        threads: BLAS threads while generating; None means one for models below 64 MiB and for runs that the disk
            holds up, else one per core.
        lock_memory: keep the mapped file in memory (`mlock`).
        verify: check mapped weights against their checksums before they are used; without, a first token comes
            sooner, and damage is not noticed.
        clock: what measures the times of `stats`.
        started: when loading began on that clock; None means now.
        listener: who is told of progress, waiting and warnings; None warns through `warnings`.

    Raises:
        InputError: the model cannot be used; the message says why and what to do.

    Examples:
        >>> with load(weight_cache=":memory") as session:
        ...     print("".join(session.generate("ROMEO:", max_tokens=8)).strip()[:1].isalpha())
        True
    """
    clock = clock or RealClock()
    started = clock.now() if started is None else started
    if plan not in PLANS:
        raise RequestError(f"the plan must be one of {', '.join(PLANS)}, not {plan!r}")
    opened = model if isinstance(model, ModelFolder) else open_folder(Path(model or STORYTELLER))
    positions = opened.config.longest_request
    if max_positions is None:
        max_positions = min(DEFAULT_MAX_POSITIONS, positions)
    if not 1 <= max_positions <= positions:
        raise RequestError(f"max_positions must be from 1 to this model's {positions}, not {max_positions}")
    if disk_bandwidth is not None and not 0 < disk_bandwidth < float("inf"):
        raise RequestError(f"disk_bandwidth must be above 0 bytes per second, not {disk_bandwidth}")
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise RequestError(f"threads must be from 1 to {_MOST_THREADS}, not {threads}")
    request = EngineRequest(
        model=opened,
        weights=weights,
        weight_cache=None if weight_cache is None else os.fspath(weight_cache),
        max_positions=max_positions,
        budget=budget,
        plan=plan,
        lock_memory=lock_memory,
        verify=verify,
        streaming=Streaming(prefetch_threads, prefetch_ring, disk_bandwidth, paged, trace),
        clock=clock,
        listener=listener or Listener(),
    )
    return Session(request, threads, started)


def _open_sound(request: EngineRequest, reason: str | None = None, *, in_memory: bool = False) -> Engine:
    """Open an engine; where weights that are read at once turn out damaged, rebuild them once."""
    if in_memory and request.budget is None:
        request = replace(request, weight_cache=IN_MEMORY)
    try:
        return open_engine(request, reason)
    except DamagedWeightsError as error:
        if reason is not None:
            raise
        return open_engine(request, error.reason)


def default_threads(config: ModelConfig) -> int:
    """One BLAS thread for a model of a cache's size: there, handing work over costs more than it saves."""
    return 1 if config.n_parameters * 4 < _BLAS_THREADS_PAY_FROM_BYTES else usable_cores()


class Session:
    """A loaded model, ready to generate; made by `load`, closed by `close` or the end of a `with` block.

    Laws: one generation at a time, each from an empty text; a new one ends the one before, which says so when it is
    asked for more. Greedy generations of the same prompt are equal. BLAS threads are set for each token computed and
    put back after it, never while the caller's code runs.
    """

    def __init__(self, request: EngineRequest, threads: int | None, started: float) -> None:
        self.model = request.model
        self.threads = threads or 1  # while the model is opened
        self._request = request
        self._clock = request.clock
        self._stats: GenerationStats | None = None
        self._latest: object = None  # the generation that may go on
        self._blas = ThreadpoolController()
        with self._blas_limits():
            self._engine: Engine | None = _open_sound(request)
        prediction = self._engine.prediction
        waits_for_disk = prediction is not None and prediction.io_bound
        # BLAS threads that wait busily for work would take the prefetch threads' core.
        self.threads = threads or (1 if waits_for_disk else default_threads(request.model.config))
        self._loading_s = self._clock.now() - started

    @property
    def max_positions(self) -> int:
        """How many positions the KV cache has room for."""
        return self._transformer.kv_cache.max_positions

    @property
    def weight_cache(self) -> WeightCacheStats:
        """What the weight cache did when the model was loaded."""
        return self._open().weight_cache

    @property
    def cache_use(self) -> CacheUse:
        """Hits, misses and bytes of the weight cache when the model was loaded."""
        return self._open().use

    @property
    def prediction(self) -> Prediction | None:
        """What this run should reach, and why, under a budget; None without one."""
        return self._open().prediction

    @property
    def trace(self) -> Trace:
        """What was read, computed and waited for since the model was loaded; empty unless `load` was asked to trace."""
        return self._open().trace

    @property
    def stats(self) -> GenerationStats | None:
        """What the last finished generation did; None before the first."""
        return self._stats

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | IntArray | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Generate text behind a prompt, piece by piece; greedy unless a temperature is given.

        Everything is checked here, before the first piece is asked for.

        Args:
            prompt: the text to go on from; give this or `token_ids`.
            token_ids: the prompt as token ids.
            max_tokens: stop after as many; None means 200, or as many as there is room for.
            temperature: 0 always takes the likeliest token; 1 draws from the model's own distribution.
            top_k: draw from the `top_k` likeliest only.
            top_p: draw from the smallest set of the likeliest that holds this share.
            seed: of the draws; None takes a different one each time.

        Returns:
            An iterator of pieces of text; without a tokenizer the pieces are empty and `stats` has the ids.

        Raises:
            InputError: the request cannot be served.
        """
        room = self.max_positions
        if (prompt is None) == (token_ids is None):
            raise RequestError("give either a prompt or token_ids")
        ids = [int(i) for i in token_ids] if token_ids is not None else self.model.encode(prompt or "")
        if seed is not None and seed < 0:
            raise RequestError(f"seed must be at least 0, not {seed}")
        sampling = Sampling(temperature, top_k, top_p)
        n = self.model.plan_request(ids, max_tokens)
        if max_tokens is None:
            n = min(n, max(1, room - len(ids)))
        if len(ids) + n > room:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and {n} more do not fit the {room} positions reserved; "
                "load the model with a larger max_positions"
            )
        return self._run(ids, n, sampling, np.random.default_rng(seed))

    def _run(self, prompt_ids: list[int], n: int, sampling: Sampling, rng: np.random.Generator) -> Iterator[str]:
        tokens = _Tokens(self._clock)
        waited = self._open().waited_s
        self._latest = tokens
        stream = TextStream(self.model.tokenizer, prompt_ids) if self.model.tokenizer else None
        pieces: list[str] = []
        for token_id in tokens.timed(self._token_ids(tokens, prompt_ids, n, sampling, rng)):
            if token_id in self.model.config.eos_token_ids:
                break
            if stream and (piece := stream.push(token_id)):
                pieces.append(piece)
                yield piece
        if stream and (piece := stream.finish()):
            pieces.append(piece)
            yield piece
        self._stats = GenerationStats(
            text="".join(pieces),
            prompt_token_ids=tuple(prompt_ids),
            token_ids=tuple(tokens.ids),
            finish_reason="stop" if tokens.ids[-1] in self.model.config.eos_token_ids else "length",
            time_to_first_token_s=self._loading_s + tokens.first_s,
            tokens_per_s=(len(tokens.ids) - 1) / tokens.later_s if tokens.later_s > 0 else None,
            peak_rss_bytes=peak_rss_bytes(),
            weight_cache=self._open().weight_cache,
            offload=self._open().offload(tokens.first_s + tokens.later_s, waited),
        )
        self._loading_s = 0.0

    def _token_ids(
        self, tokens: _Tokens, prompt_ids: list[int], n: int, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[int]:
        """Yield `n` token ids, each computed when it is asked for."""
        for _ in range(n):
            if self._latest is not tokens:
                raise RequestError("this generation was ended by a later one of the same session")
            with self._blas_limits():
                logits = self._next_logits(tokens.ids[-1:], prompt_ids)
                token_id = sample(logits, sampling, rng)
            yield token_id

    def _next_logits(self, last: list[int], prompt_ids: list[int]) -> Float32Array:
        """Return the logits `[V]` behind the last token, or behind the prompt where there is none yet."""
        if last:
            try:
                logits: Float32Array = self._transformer.decode(last)[0]
            except DamagedWeightsError:
                self._open().discard()  # what was shown cannot be taken back, but the next start builds anew
                raise
        else:
            logits = self._mend(lambda transformer: _prefill(transformer, prompt_ids))
        self._require_finite(logits)
        return logits

    def _mend(self, compute: Callable[[Transformer], _Result]) -> _Result:
        """Compute; where packed weights are found damaged, rebuild them once and start over.

        A damaged file that cannot be removed is left where it is, and the weights are packed into memory.
        """
        try:
            return compute(self._transformer)
        except DamagedWeightsError as error:
            reason = error.reason
        removed, kv_cache = self._open().discard(), self._transformer.kv_cache
        self.close()
        self._engine = _open_sound(self._request, reason, in_memory=not removed)
        self._transformer.kv_cache = kv_cache  # a text that was begun goes on, with the same weights
        return compute(self._transformer)

    def logits(self, token_ids: Sequence[int] | IntArray) -> Float32Array:
        """Return the logits `[T, V]` after each of `token_ids`; uses memory of its own, whatever is generated.

        Raises:
            RequestError: no tokens, an id out of range, or more tokens than the model has positions.
        """
        self._open()
        ids = [int(i) for i in token_ids]
        if len(ids) > self.model.config.longest_request:
            raise RequestError(f"{len(ids)} tokens are more than this model's {self.model.config.longest_request}")
        with self._blas_limits():
            logits = self._mend(lambda transformer: Transformer(transformer.source, max(1, len(ids))).decode(ids))
        self._require_finite(logits)
        return logits

    def _require_finite(self, logits: Float32Array) -> None:
        if np.isfinite(logits).all():
            return
        require_finite_weights(open_checkpoint(self.model.path))
        raise GenerationError("the logits are not finite although every weight is: the activations have overflowed")

    def _blas_limits(self) -> AbstractContextManager[object]:
        limit: Callable[..., AbstractContextManager[object]] = self._blas.limit
        return limit(limits=self.threads, user_api="blas")

    @property
    def _transformer(self) -> Transformer:
        return self._open().transformer

    def _open(self) -> Engine:
        if self._engine is None:
            raise RequestError("this session is closed; load the model again")
        return self._engine

    def close(self) -> None:
        """Release the weights and the KV cache; closing twice is allowed."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _prefill(transformer: Transformer, prompt_ids: Sequence[int]) -> Float32Array:
    """Return the logits `[V]` behind a prompt, from an empty text."""
    transformer.kv_cache.rewind(0)
    return transformer.prefill(prompt_ids)


class _Tokens:
    """The ids of one generation so far, and the time it took to make them; not the time its reader took."""

    def __init__(self, clock: Clock) -> None:
        self.ids: list[int] = []
        self.first_s = self.later_s = 0.0
        self._now = clock.now

    def timed(self, ids: Iterator[int]) -> Iterator[int]:
        """Pass `ids` on, keeping each and its time."""
        while True:
            started = self._now()
            token_id = next(ids, None)
            if token_id is None:
                return
            if self.ids:
                self.later_s += self._now() - started
            else:
                self.first_s = self._now() - started
            self.ids.append(token_id)
            yield token_id
