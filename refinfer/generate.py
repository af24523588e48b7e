"""The composition: a checkpoint becomes a weight source, a transformer over it, and text.

Knows: every room, and in which order they are put together. Does not know: options as strings, terminals, JSON text;
those are `cli`'s.
Spec: GEN-1 to GEN-9. Tutorial: 00.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from threadpoolctl import ThreadpoolController

from refinfer.arrays import Float32Array
from refinfer.errors import GenerationError, RequestError, TokenizerError, WeightsError
from refinfer.model.checkpoint import Checkpoint, open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.config_json import load_config
from refinfer.model.sampler import Sampling, sample
from refinfer.model.tokenizer import TextStream, Tokenizer, load_tokenizer
from refinfer.model.transformer import Transformer
from refinfer.model.weights import RowMajorSource
from refinfer.trace import Clock, RealClock

__all__ = [
    "DEFAULT_MAX_POSITIONS",
    "DEFAULT_MAX_TOKENS",
    "DEFAULT_PROMPT",
    "STORYTELLER",
    "GenerationStats",
    "Model",
    "Session",
    "load",
    "open_model",
    "peak_rss_bytes",
]

STORYTELLER: Final = Path(__file__).parent / "storyteller"
"""The folder of the small trained model that ships with the package."""

DEFAULT_PROMPT: Final = "ROMEO:"
DEFAULT_MAX_TOKENS: Final = 200
DEFAULT_MAX_POSITIONS: Final = 512
_BLAS_THREADS_PAY_FROM_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder that has been looked at: its config and tokenizer; no weight has been read."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer | None

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of `prompt`.

        Raises:
            TokenizerError: the model has no tokenizer, or the text cannot be expressed.
        """
        if self.tokenizer is None:
            raise TokenizerError(f"{self.folder} has no tokenizer.json; give the prompt as --token-ids")
        return self.tokenizer.encode(prompt)

    def plan_request(self, prompt_token_ids: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens to generate; checks the request before anything is reserved for it.

        `max_tokens` None means 200, or as many as the context has room for.

        Raises:
            RequestError: no prompt, an id that is not in the vocabulary, `max_tokens` below 1, or more positions
                than the model has.
        """
        config = self.config
        n = len(prompt_token_ids)
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if outside := [i for i in prompt_token_ids if not 0 <= i < config.vocab_size]:
            raise RequestError(f"token id {outside[0]} is not in the vocabulary of 0 to {config.vocab_size - 1}")
        if max_tokens is not None and max_tokens < 1:
            raise RequestError(f"max-tokens must be at least 1, not {max_tokens}")
        room = config.longest_request - n
        if room < (max_tokens or 1):
            limit = "sliding window" if config.longest_request < config.max_position_embeddings else "context"
            raise RequestError(
                f"a prompt of {n} tokens and {max_tokens or 1} more do not fit this model's {limit} of "
                f"{config.longest_request} positions"
            )
        return max_tokens if max_tokens is not None else min(DEFAULT_MAX_TOKENS, room)


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one generation did; the fields of the command line's JSON, in its order.

    `time_to_first_token_s` counts from the start of loading for a session's first generation, from the start of
    generating for later ones. `tokens_per_s` counts the tokens after the first over the time spent on them; None
    for a single token. `peak_rss_bytes` is None where the system does not tell.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    time_to_first_token_s: float
    tokens_per_s: float | None
    peak_rss_bytes: int | None
    weight_cache: None = None
    offload: None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `refinfer generate --json` prints."""
        return asdict(self)


def open_model(folder: str | os.PathLike[str] | None = None) -> Model:
    """Look at a model folder: read its config and tokenizer, but no weights; None means the storyteller.

    Raises:
        ConfigError: the folder or its config is missing or not supported.
        TokenizerError: the tokenizer is malformed or needs a package that is not installed. A model without a
            tokenizer can still be given token ids.
    """
    path = STORYTELLER if folder is None else Path(folder)
    config = load_config(path)
    return Model(path, config, load_tokenizer(path))


def load(
    model: str | os.PathLike[str] | Model | None = None,
    *,
    max_positions: int | None = None,
    threads: int | None = None,
    clock: Clock | None = None,
) -> Session:
    """Load a model and make it ready to generate.

    Args:
        model: a folder in Hugging Face's form, or what `open_model` returned; None means the storyteller.
        max_positions: how many positions, prompt and generated tokens together, the KV cache reserves;
            None means 512, or as many as the model has.
        threads: BLAS threads while generating; None means one for models below 64 MiB, else one per core.
        clock: what measures the times of `stats`.

    Raises:
        InputError: the model cannot be used; the message says why and what to do.

    Examples:
        >>> with load() as session:
        ...     print("".join(session.generate("ROMEO:", max_tokens=8)).strip()[:1].isalpha())
        True
    """
    clock = clock or RealClock()
    started = clock.now()
    opened = model if isinstance(model, Model) else open_model(model)
    positions = opened.config.longest_request
    if max_positions is None:
        max_positions = min(DEFAULT_MAX_POSITIONS, positions)
    if not 1 <= max_positions <= positions:
        raise RequestError(f"max_positions must be from 1 to this model's {positions}, not {max_positions}")
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be at least 1, not {threads}")
    checkpoint = open_checkpoint(opened.folder)
    source = RowMajorSource(opened.config, checkpoint)
    threads = threads or _default_threads(opened.config)
    return Session(opened, checkpoint, source, max_positions, threads, clock, started)


def _default_threads(config: ModelConfig) -> int:
    """One BLAS thread for a model of a cache's size: there, handing work over costs more than it saves."""
    return 1 if config.n_parameters * 4 < _BLAS_THREADS_PAY_FROM_BYTES else os.cpu_count() or 1


class Session:
    """A loaded model, ready to generate; made by `load`, closed by `close` or the end of a `with` block.

    Laws: one generation at a time; each starts from an empty text. Greedy generations of the same prompt are equal.
    BLAS threads are set while a generation runs and put back afterwards.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        source: RowMajorSource,
        max_positions: int,
        threads: int,
        clock: Clock,
        started: float,
    ) -> None:
        self.model = model
        self.threads = threads
        self._checkpoint = checkpoint
        self._source = source
        self._transformer: Transformer | None = Transformer(source, max_positions)
        self._clock = clock
        self._started: float | None = started
        self._stats: GenerationStats | None = None
        self._blas = ThreadpoolController()

    @property
    def max_positions(self) -> int:
        """How many positions the KV cache has room for."""
        return self._open().kv_cache.max_positions

    @property
    def stats(self) -> GenerationStats | None:
        """What the last finished generation did; None before the first."""
        return self._stats

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
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
        transformer = self._open()
        if (prompt is None) == (token_ids is None):
            raise RequestError("give either a prompt or token_ids")
        ids = list(token_ids) if token_ids is not None else self.model.encode(prompt or "")
        if seed is not None and seed < 0:
            raise RequestError(f"seed must be at least 0, not {seed}")
        sampling = Sampling(temperature, top_k, top_p)
        if max_tokens is None:
            max_tokens = min(self.model.plan_request(ids, None), max(1, self.max_positions - len(ids)))
        n = self.model.plan_request(ids, max_tokens)
        if len(ids) + n > self.max_positions:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and {n} more do not fit the {self.max_positions} positions reserved; "
                "load the model with a larger max_positions"
            )
        return self._run(transformer, ids, n, sampling, np.random.default_rng(seed))

    def _run(
        self, transformer: Transformer, prompt_ids: list[int], n: int, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[str]:
        now = self._clock.now
        started, self._started = self._started, None
        step_started = now()
        if started is None:
            started = step_started
        stream = TextStream(self.model.tokenizer, prompt_ids) if self.model.tokenizer else None
        ids: list[int] = []
        pieces: list[str] = []
        finish_reason = "length"
        first_s = later_s = 0.0
        transformer.kv_cache.rewind(0)
        with self._blas_limits():
            while True:
                logits = transformer.decode(ids[-1:])[0] if ids else transformer.prefill(prompt_ids)
                self._require_finite(logits)
                ids.append(sample(logits, sampling, rng))
                if len(ids) == 1:
                    first_s = now() - started
                else:
                    later_s += now() - step_started
                if ids[-1] in self.model.config.eos_token_ids:
                    finish_reason = "stop"
                    break
                if stream and (piece := stream.push(ids[-1])):
                    pieces.append(piece)
                    yield piece
                if len(ids) == n:
                    break
                step_started = now()
            if stream and (piece := stream.finish()):
                pieces.append(piece)
                yield piece
        self._stats = GenerationStats(
            text="".join(pieces),
            prompt_token_ids=tuple(prompt_ids),
            token_ids=tuple(ids),
            finish_reason=finish_reason,
            time_to_first_token_s=first_s,
            tokens_per_s=(len(ids) - 1) / later_s if later_s > 0 else None,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def logits(self, token_ids: Sequence[int]) -> Float32Array:
        """Return the logits `[T, V]` after each of `token_ids`; uses memory of its own, whatever is generated.

        Raises:
            RequestError: no tokens, an id out of range, or more tokens than the model has positions.
        """
        self._open()
        self.model.plan_request(token_ids[:-1] or token_ids, 1)
        with self._blas_limits():
            logits = Transformer(self._source, len(token_ids)).decode(token_ids)
        self._require_finite(logits)
        return logits

    def _require_finite(self, logits: Float32Array) -> None:
        if np.isfinite(logits).all():
            return
        if (name := self._checkpoint.first_non_finite()) is not None:
            raise WeightsError(f"{self._checkpoint.path_of(name)}: {name!r} holds NaN or infinity; the file is damaged")
        raise GenerationError("the logits are not finite although every weight is: the activations have overflowed")

    def _blas_limits(self) -> AbstractContextManager[object]:
        limit: Callable[..., AbstractContextManager[object]] = self._blas.limit
        return limit(limits=self.threads, user_api="blas")

    def _open(self) -> Transformer:
        if self._transformer is None:
            raise RequestError("this session is closed; load the model again")
        return self._transformer

    def close(self) -> None:
        """Release the weights and the KV cache; closing twice is allowed."""
        self._source.close()
        self._transformer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def peak_rss_bytes() -> int | None:
    """Return the most memory this process has had resident at once; None where the system does not tell.

    On Linux from `VmHWM`: unlike `getrusage` it starts anew when a program is executed.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
