"""From a checkpoint to a transformer that can compute: with packed weights in memory, mapped, or within a budget.

Knows: every room, and in which order they are put together. Does not know: text, sampling, terminals.
Spec: GEN-12 to GEN-18. Tutorial: 00, 12.

    weight_cache   budget   weights are
    "off"          no       row-major float32, nothing packed (`model.weights`)
    ":memory"      no       packed into memory at each start
    None, PATH     no       in a file, mapped: packed at the first start
    None, PATH     yes      in a file, read chunk by chunk (`offload.streamed`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from refinfer.arrays import stored_to_f32
from refinfer.errors import DamagedWeightsError, PackingError, RequestError, WeightCacheError, WeightsError
from refinfer.model.checkpoint import Checkpoint, open_checkpoint
from refinfer.model.folder import ModelFolder, readable
from refinfer.model.kv_cache import kv_cache_nbytes
from refinfer.model.transformer import Transformer, prefill_block, scratch_nbytes
from refinfer.model.weights import RowMajorSource
from refinfer.offload.budget import Budget, parse_budget
from refinfer.offload.calibration import (
    calibration_file,
    known_calibration,
    observed_calibration,
    product_seconds_per_byte,
    slower,
)
from refinfer.offload.cost import Calibration, costs_of, ideal_token_s
from refinfer.offload.inventory import Inventory
from refinfer.offload.matrices import gemm_scratch_nbytes
from refinfer.offload.optimal import locked_array
from refinfer.offload.plan import Fixed, Plan, make_plan
from refinfer.offload.prefetch import PREFETCH_THREADS
from refinfer.offload.report import simulate_plan
from refinfer.offload.source import PackedSource
from refinfer.offload.store import FileStore, ThrottledStore
from refinfer.offload.streamed import StreamedSource, staging_nbytes
from refinfer.packing.formats import pack_matrix
from refinfer.prepare import IN_MEMORY, cache_path, choose_format, prepare
from refinfer.trace import Clock, Trace
from refinfer.weight_cache.directory import discard
from refinfer.weight_cache.format import Entry
from refinfer.weight_cache.key import PackKey
from refinfer.weight_cache.load_or_build import Listener, Prepared
from refinfer.weight_cache.mapped_file import read_file
from refinfer.weight_cache.packers import LARGEST_BLOCK_BYTES

__all__ = [
    "CacheUse",
    "Engine",
    "EngineRequest",
    "OffloadStats",
    "Prediction",
    "Streaming",
    "WeightCacheStats",
    "fixed_of",
    "open_engine",
    "require_finite_weights",
    "stats_of",
]

OFF = "off"
_SMALLEST_BLOCK_BYTES = 1 << 20
_TELLING_BYTES = 32 << 20  # reading less than this tells little of a disk


@dataclass(frozen=True, slots=True)
class WeightCacheStats:
    """What the weight cache did for one start; the fields of the command line's JSON.

    `packed_buffers` and `packed_bytes` count what was packed at this start: nothing when a file was `loaded`. `reason`
    says why it was built, or why it is in memory although a file was asked for.
    """

    state: str
    path: str | None
    reason: str | None
    packed_buffers: int
    packed_bytes: int
    load_or_build_s: float


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Hits and misses of one start, the bytes it has, and the seconds that packing would have taken or took."""

    hits: int
    misses: int
    nbytes: int
    packing_s: float | None


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """What a run under a budget spent and read; the fields of the command line's JSON.

    `peak_bytes` is the most of the budget that was in use at once, `wait_s` how long the computation waited for
    chunks. `Prediction` says on what the predicted and the ideal tokens per second rest.
    """

    plan: str
    budget_bytes: int
    locked_bytes: int
    resident_bytes: int
    ring_bytes: int
    kv_cache_bytes: int
    scratch_bytes: int
    peak_bytes: int
    streamed_bytes_per_token: int
    read_bytes_total: int
    predicted_tokens_per_s: float
    ideal_tokens_per_s: float
    wait_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Streaming:
    """How chunks are read under a budget: by how many threads, into how large a ring, how fast at most.

    `paged` puts an explicit LRU page cache in the place of locks and ring; `traced` keeps what happened.
    """

    prefetch_threads: int = PREFETCH_THREADS
    prefetch_ring: int | None = None
    disk_bandwidth: float | None = None
    paged: bool = False
    traced: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run under a budget should reach, known before its first token.

    `token_s` is how long the simulator thinks a token takes with the costs of `calibration`, `ideal_token_s` the bound
    that no run with these locks can beat; `io_bound` says that reading a token's chunks takes longer than its products.
    """

    token_s: float
    ideal_token_s: float
    io_bound: bool
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is asked to be; see `generate.load` for the meaning of each field."""

    model: ModelFolder
    weights: str
    weight_cache: str | None
    max_positions: int
    budget: int | str | None
    plan: str
    lock_memory: bool
    verify: bool
    streaming: Streaming
    clock: Clock
    listener: Listener


@dataclass(frozen=True, slots=True)
class Engine:
    """A transformer over its weights, and what is known of how they came.

    `discard` removes the cache file after damage, and tells whether it is gone; `offload` says what a run spent, given
    the seconds it took and what `waited_s` was before it. There is a `prediction` under a budget only.
    """

    transformer: Transformer
    weight_cache: WeightCacheStats
    use: CacheUse
    prediction: Prediction | None = None
    discard: Callable[[], bool] = field(default=lambda: False)
    offload: Callable[[float, float], OffloadStats | None] = field(default=lambda seconds, waited: None)

    @property
    def trace(self) -> Trace:
        """What was read, computed and waited for, where that was asked for."""
        source = self.transformer.source
        return source.trace if isinstance(source, StreamedSource) else Trace(())

    @property
    def waited_s(self) -> float:
        """The seconds waited for chunks so far."""
        source = self.transformer.source
        return source.wait_s if isinstance(source, StreamedSource) else 0.0

    def close(self) -> None:
        """Release the weights."""
        self.transformer.source.close()


# --8<-- [start:ways]
def open_engine(request: EngineRequest, reason: str | None = None) -> Engine:
    """Put an engine together; `reason` says why the cache has to be rebuilt, where it has.

    Raises:
        InputError: the model or the request cannot be used; the message says why.
    """
    with readable(request.model.path):
        checkpoint = open_checkpoint(request.model.path)
    name = choose_format(checkpoint, request.weights)
    try:
        if request.budget is not None:
            return _streamed(request, checkpoint, name, reason)
        if request.weight_cache == OFF:
            return _row_major(request, checkpoint, name)
        return _packed(request, checkpoint, name, reason)
    except PackingError:
        require_finite_weights(checkpoint)
        raise


# --8<-- [end:ways]


def require_finite_weights(checkpoint: Checkpoint) -> None:
    """Name the damaged tensor, if there is one; reads every weight.

    Raises:
        WeightsError: a tensor holds NaN or infinity.
    """
    if (name := checkpoint.first_non_finite()) is not None:
        raise WeightsError(f"{checkpoint.path_of(name)}: {name!r} holds NaN or infinity; the file is damaged")


def _row_major(request: EngineRequest, checkpoint: Checkpoint, name: str) -> Engine:
    started = request.clock.now()
    exact = name == choose_format(checkpoint, "auto")  # the format that keeps every weight as it is stored
    widen = stored_to_f32 if exact else lambda w: pack_matrix(w, name).unpack()
    source = RowMajorSource(request.model.config, checkpoint, widen)
    stats = WeightCacheStats(OFF, None, None, 0, 0, request.clock.now() - started)
    return Engine(Transformer(source, request.max_positions), stats, CacheUse(0, 0, 0, None))


def _packed(request: EngineRequest, checkpoint: Checkpoint, name: str, reason: str | None) -> Engine:
    inventory = Inventory(request.model.config, name)
    started = request.clock.now()
    prepared = _prepare_somewhere(request, inventory, checkpoint, reason)
    stats, use = stats_of(prepared, request.clock.now() - started)
    mapped, most_rows = prepared.mapped, prefill_block(request.model.config, request.max_positions)
    checked = mapped if request.verify else None
    source = PackedSource(inventory, prepared.provider, prepared.keys, most_rows, request.clock, checked)
    engine = Engine(Transformer(source, request.max_positions), stats, use)
    if mapped is None:
        return engine
    if request.lock_memory:
        mapped.lock_memory()
    return replace(engine, discard=lambda: discard(mapped.path, mapped.is_at))


def _prepare_somewhere(
    request: EngineRequest, inventory: Inventory, checkpoint: Checkpoint, reason: str | None
) -> Prepared:
    """Prepare as asked; where the file cannot be written, in memory, with one warning."""
    clock, listener = request.clock, request.listener
    try:
        return prepare(inventory, checkpoint, request.weight_cache, clock=clock, listener=listener, reason=reason)
    except WeightCacheError as error:
        listener.warn(f"{error}; the weights are packed into memory, and will be again at the next start")
        return prepare(inventory, checkpoint, IN_MEMORY, clock=clock, listener=listener, reason=str(error))


def stats_of(prepared: Prepared, seconds: float) -> tuple[WeightCacheStats, CacheUse]:
    """Return what the command line tells of a cache that took `seconds` to prepare."""
    stats = WeightCacheStats(
        prepared.state,
        str(prepared.mapped.path) if prepared.mapped else None,
        prepared.reason,
        len(prepared.packed),
        prepared.packed_bytes,
        seconds,
    )
    hits = len(prepared.provider) - len(prepared.packed)
    return stats, CacheUse(hits, len(prepared.packed), prepared.held_bytes, prepared.packing_s)


def fixed_of(inventory: Inventory, max_positions: int) -> Fixed:
    """Return what a run needs whatever its plan: the vectors, the KV cache, activations and scratch."""
    config = inventory.config
    block = prefill_block(config, max_positions)
    scratch = scratch_nbytes(config, max_positions) + gemm_scratch_nbytes(inventory, block)
    return Fixed(
        resident=inventory.resident_nbytes,
        kv_cache=kv_cache_nbytes(config, max_positions),
        scratch=scratch + staging_nbytes(inventory, block),
    )


def _streamed(request: EngineRequest, checkpoint: Checkpoint, name: str, reason: str | None) -> Engine:
    if request.weight_cache in (OFF, IN_MEMORY):
        raise RequestError(f"a budget needs a cache file; --weight-cache {request.weight_cache} has none")
    if request.lock_memory:
        raise RequestError("lock_memory is for mapped files; under a budget the plan says what is locked")
    clock, config, positions = request.clock, request.model.config, request.max_positions
    inventory = Inventory(config, name)
    limit = request.budget
    budget = Budget(parse_budget(limit, inventory.streamable_nbytes) if isinstance(limit, str) else limit or 0)
    streaming, path = request.streaming, cache_path(checkpoint, name, request.weight_cache)
    calibration = slower(known_calibration(calibration_file(), path), streaming.disk_bandwidth)
    plan = make_plan(
        request.plan,
        inventory,
        fixed_of(inventory, positions),
        budget.limit,
        ring_nbytes=streaming.prefetch_ring,
        readers=streaming.prefetch_threads,
        calibration=calibration,
    )
    started = clock.now()
    prepared = _prepare_within(budget, request, inventory, checkpoint, reason)
    stats, use = stats_of(prepared, clock.now() - started)
    keys, quiet = prepared.keys, not prepared.packed  # what was just written is still on its way to the disk
    prepared.provider.delete_cache()
    del prepared  # the mapping goes before anything is read
    store = FileStore(path)
    rate = streaming.disk_bandwidth
    try:
        entries = _entries_of(path, keys)
    except BaseException:
        store.close()
        raise
    try:
        source = StreamedSource(
            inventory,
            entries,
            store if rate is None else ThrottledStore(store, rate, clock),
            plan,
            budget,
            most_rows=prefill_block(config, positions),
            clock=clock,
            threads=streaming.prefetch_threads,
            paged=streaming.paged,
            traced=streaming.traced,
            where=str(path),
        )
    except BaseException as error:
        store.close()
        if isinstance(error, DamagedWeightsError):
            discard(path, store.is_at)
        raise
    try:
        transformer = Transformer(source, positions)
        if not calibration.measured:
            calibration = _observe(calibration, inventory, source, streaming.prefetch_threads, clock, quiet=quiet)
        prediction = _predict(plan, inventory, source, streaming, calibration)
    except BaseException:
        source.close()
        raise
    return Engine(
        transformer,
        stats,
        use,
        prediction,
        discard=lambda: discard(path, store.is_at),
        offload=lambda seconds, waited: _offload_stats(
            plan, inventory, prediction, budget.peak, store.bytes_read, seconds, source.wait_s - waited
        ),
    )


def _entries_of(path: Path, keys: Mapping[str, PackKey]) -> dict[str, Entry]:
    """Return the entries of the buffers with these keys, by name.

    Raises:
        DamagedWeightsError: the file does not have them; it had them a moment ago.
    """
    entries = {entry.key: entry for entry in read_file(path)[1].entries}
    if not entries.keys() >= set(keys.values()):
        raise DamagedWeightsError(f"{path} was replaced while it was opened")
    return {name: entries[key] for name, key in keys.items()}


def _observe(
    calibration: Calibration, inventory: Inventory, source: StreamedSource, readers: int, clock: Clock, *, quiet: bool
) -> Calibration:
    """Return what reading and multiplying the locked chunks has shown, where that is enough to tell."""
    nbytes = sum(map(len, source.locked.values()))
    enough = quiet and nbytes >= _TELLING_BYTES and source.lock_s > 0
    return observed_calibration(
        calibration,
        inventory.format,
        readers,
        nbytes / source.lock_s if enough else None,
        product_seconds_per_byte(inventory, source.locked, source.scratch, clock),
    )


def _predict(
    plan: Plan, inventory: Inventory, source: StreamedSource, streaming: Streaming, calibration: Calibration
) -> Prediction:
    """Simulate what the source will do."""
    readers = 0 if streaming.paged else streaming.prefetch_threads
    locked = locked_array(inventory, frozenset(source.locked))
    costs = costs_of(inventory, calibration, readers=readers)
    run = simulate_plan(inventory, replace(plan, locked=frozenset(source.locked)), costs, readers)
    reading_s = sum(costs.reads(locked)) / max(readers, 1)
    return Prediction(run.token_s, ideal_token_s(costs, locked, readers), reading_s > sum(costs.compute_s), calibration)


def _prepare_within(
    budget: Budget, request: EngineRequest, inventory: Inventory, checkpoint: Checkpoint, reason: str | None
) -> Prepared:
    """Prepare the cache file with packing blocks that fit the budget."""
    block = min(budget.limit, max(_SMALLEST_BLOCK_BYTES, min(LARGEST_BLOCK_BYTES, budget.limit // 4)))
    try:
        prepared = prepare(
            inventory,
            checkpoint,
            request.weight_cache,
            clock=request.clock,
            listener=request.listener,
            block=block,
            reason=reason,
        )
    except WeightCacheError as error:
        raise RequestError(f"{error}; a budget needs a cache file: name another place with --weight-cache") from None
    if prepared.packed:  # a block was in use, alone
        budget.acquire(block, "packing")
        budget.release(block)
    return prepared


def _offload_stats(
    plan: Plan,
    inventory: Inventory,
    prediction: Prediction,
    peak: int,
    read: int,
    seconds: float,
    waited: float,
) -> OffloadStats:
    account = plan.account
    return OffloadStats(
        plan=plan.name,
        budget_bytes=account.budget,
        locked_bytes=account.locked,
        resident_bytes=account.resident,
        ring_bytes=account.ring,
        kv_cache_bytes=account.kv_cache,
        scratch_bytes=account.scratch,
        peak_bytes=peak,
        streamed_bytes_per_token=inventory.streamable_nbytes - account.locked,
        read_bytes_total=read,
        predicted_tokens_per_s=1 / prediction.token_s,
        ideal_tokens_per_s=1 / prediction.ideal_token_s,
        wait_s=waited,
        compute_s=max(0.0, seconds - waited),
    )
