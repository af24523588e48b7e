"""Builds a transformer from a checkpoint, with packed weights in memory, in a mapped file, or within a budget.

Connects the other rooms. Leaves to others: text, sampling, terminals.
Read more: tutorials 00, 12; clauses GEN-12 to GEN-18.

    weight_cache   within a budget   weights are
    "off"          no                row-major float32, nothing packed (`model.weights`)
    ":memory"      no                packed into memory at each start
    None, PATH     no                in a file, mapped: packed at the first start
    None, PATH     yes               in a file, read chunk by chunk (`offload.streamed`)

A person's own source of weights takes the place of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from refinfer.arrays import stored_to_f32
from refinfer.clock import Clock
from refinfer.errors import PackingError, RequestError, WeightCacheError, WeightsError
from refinfer.inventory import Inventory
from refinfer.model.checkpoint import Checkpoint
from refinfer.model.folder import ModelFolder
from refinfer.model.transformer import Transformer, prefill_block
from refinfer.model.weights import RowMajorSource
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.run import BudgetedRun, PlannedRun, Within, open_run, plan_run
from refinfer.packing.formats import pack_matrix
from refinfer.planning.own_plan import own_plan
from refinfer.prepare import IN_MEMORY, OFF, cache_path, choose_format, prepare
from refinfer.sources.own_source import MakeSource, own_source
from refinfer.sources.packed import PackedSource
from refinfer.trace import Trace
from refinfer.weight_cache.format import MAGIC
from refinfer.weight_cache.load_or_build import CacheOutcome, Listener, Prepared
from refinfer.weight_cache.mapped_file import MappedFile
from refinfer.weight_cache.publish import discard

__all__ = ["CacheOptions", "Engine", "EngineRequest", "open_engine", "require_finite_weights"]


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Where packed weights are kept, and whether the mapped file is locked in memory (`mlock`) and checked."""

    place: str | None
    lock_memory: bool
    verify: bool


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """The arguments of `open_engine`; `generate.load` explains the meaning of each field."""

    model: ModelFolder
    weights: str
    max_positions: int
    cache: CacheOptions
    within: Within | None
    clock: Clock
    listener: Listener
    source: MakeSource | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """A transformer over its weights, with the cache's outcome, the file if it is mapped, and a run within a budget."""

    transformer: Transformer
    cache: CacheOutcome
    mapped: MappedFile | None = None
    run: BudgetedRun | None = None

    @property
    def trace(self) -> Trace:
        """The reads, products and waits; empty unless a run within a budget is traced."""
        return self.run.recorder.trace if self.run else Trace(())

    @property
    def waited_s(self) -> float:
        """The seconds spent waiting for chunks so far."""
        return self.run.recorder.wait_s if self.run else 0.0

    def discard(self) -> bool:
        """Remove the cache file after damage; return whether it is gone."""
        file = self.run.store if self.run else self.mapped
        return file is not None and discard(file.path, MAGIC, file.is_at)

    def close(self) -> None:
        """Release the weights."""
        self.transformer.source.close()


# --8<-- [start:ways]
def open_engine(request: EngineRequest, reason: str | None = None) -> Engine:
    """Build an engine; `reason` says why the cache must be rebuilt, or is None.

    Raises:
        InputError: the model or the request cannot be used; the message says why.
    """
    if request.source is not None:
        return _own(request, request.source)
    checkpoint = request.model.checkpoint()
    inventory = Inventory(request.model.config, choose_format(checkpoint, request.weights))
    try:
        if request.within is not None:
            engine = _within_budget(request, request.within, inventory, checkpoint)
        elif request.cache.place == OFF:
            return _row_major(request, inventory, checkpoint)
        else:
            engine = _packed(request, inventory, checkpoint)
    except PackingError:
        require_finite_weights(checkpoint)
        raise
    if reason is None or engine.cache.state == "loaded":
        return engine
    return replace(engine, cache=replace(engine.cache, reason=reason))


# --8<-- [end:ways]


def require_finite_weights(checkpoint: Checkpoint) -> None:
    """Raise an error if a tensor holds NaN or infinity; reads every weight.

    Raises:
        WeightsError: a tensor holds NaN or infinity.
    """
    if (name := checkpoint.first_non_finite()) is not None:
        raise WeightsError(f"{checkpoint.path_of(name)}: {name!r} holds NaN or infinity; the file is damaged")


def _own(request: EngineRequest, make: MakeSource) -> Engine:
    started = request.clock.now()
    source = own_source(make, request.model.config, request.model.path)
    outcome = CacheOutcome(OFF, load_or_build_s=request.clock.now() - started)
    try:
        return Engine(Transformer(source, request.max_positions), outcome)
    except BaseException:
        source.close()
        raise


def _row_major(request: EngineRequest, inventory: Inventory, checkpoint: Checkpoint) -> Engine:
    started = request.clock.now()
    exact = inventory.format == choose_format(checkpoint, "auto")
    widen = stored_to_f32 if exact else lambda w: pack_matrix(w, inventory.format).unpack()
    source = RowMajorSource(request.model.config, checkpoint, widen)
    outcome = CacheOutcome(OFF, load_or_build_s=request.clock.now() - started)
    return Engine(Transformer(source, request.max_positions), outcome)


def _packed(request: EngineRequest, inventory: Inventory, checkpoint: Checkpoint) -> Engine:
    prepared = _prepare_somewhere(request, inventory, checkpoint)
    mapped, most_rows = prepared.mapped, prefill_block(request.model.config, request.max_positions)
    checked = mapped if request.cache.verify else None
    source = PackedSource(inventory, prepared.provider, prepared.keys, most_rows, request.clock, checked, Prefetcher)
    if mapped is not None and request.cache.lock_memory:
        mapped.lock_memory()
    return Engine(Transformer(source, request.max_positions), prepared.outcome, mapped)


def _prepare_somewhere(request: EngineRequest, inventory: Inventory, checkpoint: Checkpoint) -> Prepared:
    """Prepare as asked; if the file cannot be written, give one warning and pack into memory."""
    clock, listener = request.clock, request.listener
    try:
        return prepare(inventory, checkpoint, request.cache.place, clock=clock, listener=listener)
    except WeightCacheError as error:
        listener.warn(f"{error}; the weights are packed into memory, and will be again at the next start")
        prepared = prepare(inventory, checkpoint, IN_MEMORY, clock=clock, listener=listener)
        return replace(prepared, outcome=replace(prepared.outcome, reason=str(error)))


def _within_budget(request: EngineRequest, within: Within, inventory: Inventory, checkpoint: Checkpoint) -> Engine:
    if request.cache.place in (OFF, IN_MEMORY):
        raise RequestError(f"--weight-cache {request.cache.place} keeps no file, which a budget needs; name a file")
    if request.cache.lock_memory:
        raise RequestError("lock_memory cannot be used within a budget: there the plan decides what is locked")
    path = cache_path(checkpoint, inventory.format, request.cache.place)
    planned = plan_run(replace(within, plan=own_plan(within.plan)), inventory, request.max_positions, path)
    prepared = _prepare_within(planned, request, inventory, checkpoint)
    keys, outcome = prepared.keys, prepared.outcome
    prepared.provider.delete_cache()
    del prepared  # the mapping is released before anything is read
    run = open_run(planned, keys, request.clock, quiet=not outcome.packed_buffers)
    try:
        transformer = Transformer(run.source, request.max_positions)
    except BaseException:
        run.source.close()
        raise
    return Engine(transformer, outcome, run=run)


def _prepare_within(
    planned: PlannedRun, request: EngineRequest, inventory: Inventory, checkpoint: Checkpoint
) -> Prepared:
    """Prepare the cache file: what packing takes is given back before the run takes its own parts of the budget."""
    budget, packing = planned.budget, planned.plan.account.fixed.packing
    budget.acquire(packing, "packing")
    try:
        return prepare(inventory, checkpoint, request.cache.place, clock=request.clock, listener=request.listener)
    except WeightCacheError as error:
        raise RequestError(f"{error}; a budget needs a cache file: name another place with --weight-cache") from None
    finally:
        budget.release(packing)
