"""Generating text: a session over a loaded model.

Turns prompts into text, and rebuilds a damaged cache once. Leaves to others: building a transformer from weights
(`engine`), one user at a time (`one_user`), parsing options, terminals, JSON text.
Read more: tutorial 00; clauses GEN-1 to GEN-11, GEN-16, GEN-17, GEN-19 to GEN-24, CAL-11.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from refinfer.arrays import BoolArray, Float32Array, IntArray
from refinfer.blas_threads import Trial, blas_threads, default_threads
from refinfer.clock import Clock, RealClock
from refinfer.engine import CacheOptions, Engine, EngineRequest, open_engine, require_finite_weights
from refinfer.errors import DamagedWeightsError, GenerationError, RequestError
from refinfer.model.folder import DEFAULT_POSITIONS, ModelFolder, checked_token_ids, open_folder
from refinfer.model.sampler import Sampling, sample
from refinfer.model.tokenizer import TextStream
from refinfer.model.transformer import Transformer
from refinfer.model.weights import WeightSource
from refinfer.offload.prediction import OffloadStats, Prediction
from refinfer.offload.run import Within
from refinfer.one_user import InTurn, Kept, OneUser
from refinfer.planning.cost import PREFETCH_THREADS
from refinfer.planning.plan import Prefetch, require_plan
from refinfer.prepare import IN_MEMORY
from refinfer.process import peak_rss_bytes
from refinfer.trace import Trace
from refinfer.units import is_number, is_whole, shown
from refinfer.weight_cache.load_or_build import CacheOutcome, Listener

__all__ = [
    "DEFAULT_MAX_POSITIONS",
    "DEFAULT_PROMPT",
    "STORYTELLER",
    "GenerationStats",
    "Session",
    "load",
]

STORYTELLER: Final = Path(__file__).parent / "storyteller"
"""The folder of the small trained model that ships with the package."""

DEFAULT_PROMPT: Final = "ROMEO:"
DEFAULT_MAX_POSITIONS: Final = 512
_MOST_THREADS: Final = 1024
_NO_HELP: Final = "rebuilding the file did not help: remove it, or name another with --weight-cache"


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """The figures of one generation: the fields of the command line's JSON, in the same order, without `sampling`.

    `time_to_first_token_s` is the time from the start of loading to the first token; in later generations of a session,
    loading is not counted. `tokens_per_s` is the number of tokens after the first, divided by the time spent on them;
    None for a single token. `peak_rss_bytes` is None if the system does not report it.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    time_to_first_token_s: float
    tokens_per_s: float | None
    peak_rss_bytes: int | None
    weight_cache: CacheOutcome | None = None
    offload: OffloadStats | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `refinfer generate --json` prints."""
        return asdict(self) | {"offload": self.offload.to_json() if self.offload else None}


def load(
    model: str | os.PathLike[str] | ModelFolder | None = None,
    *,
    weights: str = "auto",
    source: Callable[..., WeightSource] | None = None,
    budget: float | str | None = None,
    plan: str | Callable[..., BoolArray] = "optimal",
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
        model: a folder in Hugging Face's form, the name of a model in the Hugging Face cache, such as "org/name", or
            what `open_folder` returned; None means the storyteller.
        weights: the format to pack weights in: f32, bf16, int8, int4, or auto, which is bf16 if the checkpoint is
            stored in bfloat16 and f32 otherwise, so that nothing is lost.
        source: a class or function that makes a weight source from a config and a folder, to be used instead of all
            that follows about packed weights, budgets and files; None means refinfer's own.
        budget: the memory to run in: bytes, a size such as "300MB", or a share of the packed weights such as "40%".
        plan: which chunks stay in memory under a budget: one of `planning.plan.PLANS`, or a function from an inventory
            and a room in bytes to a mask, as tutorial 09 explains.
        prefetch_threads: number of threads that read ahead; 0 reads each chunk when it is needed.
        prefetch_ring: bytes of memory for chunks that were read ahead; None lets the plan choose.
        disk_bandwidth: the largest number of bytes to read per second; None sets no limit.
        paged: use an LRU page cache, as mmap would, instead of locks and a ring.
        trace: record every read, product and wait for `Session.trace`.
        weight_cache: the file to keep packed weights in; None means one in the user's cache directory. ":memory"
            packs at each start. "off" packs nothing: numpy multiplies row-major float32 weights with the same values,
            as a reference to compare with.
        max_positions: number of positions that the KV cache reserves for prompt and generated tokens together;
            None means 512, or 256 within a budget, or less if the model has fewer.
        threads: BLAS threads while generating; None means one for models below 64 MiB and for runs that wait for the
            disk, else one per core; other runs within a budget try both with their first tokens.
        lock_memory: keep the mapped file in memory (`mlock`).
        verify: check mapped weights against their checksums before they are used; if False, the first token comes
            sooner, but damage is not noticed.
        clock: the clock that measures the times in `stats`.
        started: the time on that clock at which loading began; None means now.
        listener: callbacks for progress, waiting and warnings; None sends warnings to the `warnings` module.

    Raises:
        InputError: the model cannot be used; the message says why and what to do.

    Examples:
        >>> with load(weight_cache=":memory") as session:
        ...     print("".join(session.generate("ROMEO:", max_tokens=8)).strip()[:1].isalpha())
        True
    """
    clock = clock or RealClock()
    started = clock.now() if started is None else started
    require_plan(plan)
    if callable(plan) and budget is None:
        raise RequestError("a plan can be used only within a budget; give a budget too")
    opened = model if isinstance(model, ModelFolder) else open_folder(model or STORYTELLER)
    listener = listener or Listener()
    for warning in opened.warnings:
        listener.warn(warning)
    positions = opened.config.longest_request
    if max_positions is None:
        max_positions = min(DEFAULT_MAX_POSITIONS if budget is None else DEFAULT_POSITIONS, positions)
    if not is_whole(max_positions, 1, positions):
        raise RequestError(
            f"max_positions must be a whole number from 1 to this model's {positions}, not {shown(max_positions)}"
        )
    if disk_bandwidth is not None and not (is_number(disk_bandwidth) and disk_bandwidth > 0):
        raise RequestError(f"disk_bandwidth must be above 0 bytes per second, not {shown(disk_bandwidth)}")
    if threads is not None and not is_whole(threads, 1, _MOST_THREADS):
        raise RequestError(f"threads must be a whole number from 1 to {_MOST_THREADS}, not {shown(threads)}")
    prefetch = Prefetch(prefetch_threads, prefetch_ring)
    place = None if weight_cache is None else os.fspath(weight_cache)
    packed = {"weights": weights != "auto", "budget": budget is not None, "weight_cache": place is not None,
              "lock_memory": lock_memory}  # fmt: skip
    if source is not None and any(packed.values()):
        raise RequestError(f"source takes the place of {' and '.join(n for n, given in packed.items() if given)}")
    request = EngineRequest(
        model=opened,
        weights=weights,
        max_positions=int(max_positions),
        cache=CacheOptions(place, lock_memory, verify),
        within=None if budget is None else Within(budget, plan, prefetch, disk_bandwidth, paged, trace),
        clock=clock,
        listener=listener,
        source=source,
    )
    return Session(request, None if threads is None else int(threads), started)


def _open_sound(request: EngineRequest, reason: str | None = None, *, in_memory: bool = False) -> Engine:
    """Open an engine; if weights that are read while it opens are damaged, rebuild them once."""
    if in_memory and request.within is None:
        request = replace(request, cache=replace(request.cache, place=IN_MEMORY))
    try:
        return open_engine(request, reason)
    except DamagedWeightsError as error:
        if reason is not None:
            raise DamagedWeightsError(error.reason, _NO_HELP) from None
        return open_engine(request, error.reason)


class Session:
    """A loaded model, ready to generate; made by `load`, closed by `close` or the end of a `with` block.

    Laws: a session runs one generation at a time, and each begins with an empty context. A new generation ends the one
    before it; asking that one for more raises an error. Greedy generations of the same prompt are equal. The number of
    BLAS threads is set only while a token is computed, never while the caller's code runs. While one thread computes,
    any other that wants to is refused; between tokens threads may take turns, and any may close the session.
    """

    def __init__(self, request: EngineRequest, threads: int | None, started: float) -> None:
        self.model = request.model
        self.threads = threads or 1  # while the model is opened
        self._request = request
        self._clock = request.clock
        self._stats: GenerationStats | None = None
        self._latest: object = None  # the generation that may go on
        self._user = OneUser()
        with self._computing():
            engine = _open_sound(request)
        self._engine = Kept(self, engine, f"the session of {request.model.path}")
        self.threads = threads or default_threads(request.model.config.n_parameters)
        self._trial: Trial | None = None
        if threads is None and engine.run is not None:
            # BLAS threads that wait busily for work take the prefetch threads' cores.
            if engine.run.may_try_threads(self.threads):
                self._trial = Trial(self.threads)
            else:
                self.threads = 1
        self._loading_s = self._clock.now() - started

    @property
    def max_positions(self) -> int:
        """The number of positions that the KV cache has room for."""
        return self._transformer.kv_cache.max_positions

    @property
    def weight_cache(self) -> CacheOutcome:
        """What the weight cache did when the model was loaded."""
        return self._engine.now().cache

    @property
    def source(self) -> WeightSource:
        """The source of the weights."""
        return self._transformer.source

    @property
    def prediction(self) -> Prediction | None:
        """The predicted speed of this run, and what it rests on; None without a budget."""
        run = self._engine.now().run
        return run.prediction if run else None

    @property
    def trace(self) -> Trace:
        """The reads, products and waits since the model was loaded; empty unless `load` was asked to trace."""
        return self._engine.now().trace

    @property
    def stats(self) -> GenerationStats | None:
        """The figures of the last finished generation; None before the first."""
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
        """Continue a prompt, piece by piece; greedy unless a temperature is given.

        This call checks the request, before the first piece is asked for.

        Args:
            prompt: the text to continue; give this or `token_ids`.
            token_ids: the prompt as token ids.
            max_tokens: stop after this many tokens; None means 200, or less if there is less room.
            temperature: 0 always takes the likeliest token; 1 draws from the model's own distribution.
            top_k: draw only from the `top_k` likeliest tokens.
            top_p: draw only from the smallest set of the likeliest tokens that together have this probability.
            seed: random seed for sampling; None takes a different one each time.

        Returns:
            An iterator of pieces of text; without a tokenizer there are no pieces and `stats` has the ids. Asking it
            for a piece while another thread computes raises SessionInUseError.

        Raises:
            InputError: the request cannot be served.
        """
        room = self.max_positions
        if (prompt is None) == (token_ids is None):
            raise RequestError("give either a prompt or token_ids")
        if not isinstance(prompt, str | None):
            raise RequestError(f"a prompt is a text, not {type(prompt).__name__}; give token ids as token_ids")
        ids = checked_token_ids(token_ids) if token_ids is not None else self.model.encode(prompt or "")
        if seed is not None and not is_whole(seed, 0):
            raise RequestError(f"seed must be a whole number from 0 up, not {shown(seed)}")
        sampling = Sampling(temperature, top_k, top_p)
        n = self.model.plan_request(ids, max_tokens)
        if max_tokens is None:
            n = min(n, max(1, room - len(ids)))
        if len(ids) + n > room:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and {n} more do not fit the {room} positions reserved; "
                "load the model with a larger max_positions"
            )
        return InTurn(self._run(ids, n, sampling, np.random.default_rng(seed)), self._computing)

    def _run(
        self, prompt_ids: list[int], n: int, sampling: Sampling, rng: np.random.Generator
    ) -> Generator[str, None, None]:
        tokens = _Tokens(self._clock)
        waited = self._engine.now().waited_s
        self._latest = tokens
        stream = TextStream(self.model.tokenizer, prompt_ids) if self.model.tokenizer else None
        pieces: list[str] = []
        for token_id in tokens.timed(self._token_ids(tokens, prompt_ids, n, sampling, rng)):
            if self._trial is not None and len(tokens.ids) > 1:
                self._trial.took(tokens.last_s)
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
            weight_cache=self._engine.now().cache,
            offload=run.stats(tokens.first_s + tokens.later_s, waited) if (run := self._engine.now().run) else None,
        )
        self._loading_s = 0.0

    def _token_ids(
        self, tokens: _Tokens, prompt_ids: list[int], n: int, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[int]:
        """Yield `n` token ids, each computed when it is asked for."""
        for _ in range(n):
            if self._latest is not tokens:
                raise RequestError("this generation was ended by a later one of the same session")
            run = self._engine.now().run
            # A prompt always has the session's own number of threads: its products might have other bits with another.
            limit = blas_threads.limited(self._trial.threads) if self._trial and tokens.ids else nullcontext()
            is_told = not tokens.ids or self._trial is None or self._trial.is_over  # by turns, a speed says little
            with limit, run.meter.token(first=not tokens.ids) if run and is_told else nullcontext():
                logits = self._next_logits(tokens.ids[-1:], prompt_ids)
            yield sample(logits, sampling, rng)

    def _next_logits(self, last: list[int], prompt_ids: list[int]) -> Float32Array:
        """Return the logits `[V]` after the last token, or after the prompt if there is no token yet."""
        if last:
            try:
                return self._finite(self._transformer.decode(last)[0])
            except DamagedWeightsError:
                self._engine.now().discard()  # what was shown stays wrong, but the next start rebuilds the file
                raise
        return self._mend(lambda transformer: _prefill(transformer, prompt_ids))

    def _mend(self, compute: Callable[[Transformer], Float32Array]) -> Float32Array:
        """Compute; if packed weights are found damaged, rebuild them once and start over.

        A damaged file that cannot be removed is left where it is, and the weights are packed into memory.
        """
        try:
            return self._finite(compute(self._transformer))
        except DamagedWeightsError as error:
            reason = error.reason
        kv_cache = self._transformer.kv_cache
        removed = self._engine.now().discard()
        self._engine.renew(lambda: _open_sound(self._request, reason, in_memory=not removed))
        self._transformer.kv_cache = kv_cache  # a text that was begun goes on with the same weights
        try:
            return self._finite(compute(self._transformer))
        except DamagedWeightsError as error:
            raise DamagedWeightsError(error.reason, _NO_HELP) from None

    def logits(self, token_ids: Sequence[int] | IntArray) -> Float32Array:
        """Return the logits `[T, V]` after each of `token_ids`; does not disturb a generation under way.

        Raises:
            RequestError: no row of whole numbers, an id out of range, or more tokens than the model has positions.
            SessionInUseError: another thread is computing.
        """
        self._engine.now()
        ids = checked_token_ids(token_ids)
        if len(ids) > self.model.config.longest_request:
            raise RequestError(f"{len(ids)} tokens are more than this model's {self.model.config.longest_request}")
        with self._computing():
            return self._mend(lambda transformer: Transformer(transformer.source, max(1, len(ids))).decode(ids))

    def _finite(self, logits: Float32Array) -> Float32Array:
        if np.isfinite(logits).all():
            return logits
        require_finite_weights(self.model.checkpoint())
        if self.weight_cache.state == "loaded":
            raise DamagedWeightsError(
                f"{self.weight_cache.path}: its logits are not finite, although all weights of the model are"
            )
        raise GenerationError("the logits are not finite although every weight is: the activations have overflowed")

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Be the one who computes, with the BLAS threads asked for."""
        with self._user.enter(), blas_threads.limited(self.threads):
            yield

    @property
    def _transformer(self) -> Transformer:
        return self._engine.now().transformer

    def close(self) -> None:
        """Release the weights and the KV cache; closing twice is allowed."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _prefill(transformer: Transformer, prompt_ids: Sequence[int]) -> Float32Array:
    """Return the logits `[V]` after a prompt, from an empty text."""
    transformer.kv_cache.rewind(0)
    return transformer.prefill(prompt_ids)


class _Tokens:
    """The ids of one generation so far, and the time spent computing them, without the time that the caller takes."""

    def __init__(self, clock: Clock) -> None:
        self.ids: list[int] = []
        self.first_s = self.later_s = self.last_s = 0.0
        self._now = clock.now

    def timed(self, ids: Iterator[int]) -> Iterator[int]:
        """Yield each of `ids`, and record it and the time it took."""
        while True:
            started = self._now()
            token_id = next(ids, None)
            if token_id is None:
                return
            self.last_s = self._now() - started
            if self.ids:
                self.later_s += self.last_s
            else:
                self.first_s = self.last_s
            self.ids.append(token_id)
            yield token_id
