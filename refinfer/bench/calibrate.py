"""What reads and products cost on this machine, kept for `plan`, `simulate` and `generate --budget`.

Measures every chunk size, number of prefetch threads and format. Leaves to others: costs that are derived from it
(`planning.cost`), the file that keeps it (`offload.calibration`).
Read more: tutorial 11; clauses CAL-1, CAL-2.

Reads are checked reads, like those of the prefetch threads, from a file written for this in the cache directory.
Products are of chunks that are not in the processor's caches, with one BLAS thread.
"""

from __future__ import annotations

import json
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
from threadpoolctl import threadpool_limits

from refinfer.arrays import PAGE_BYTES, aligned_empty
from refinfer.bench.entry import Bench, Progress, Row
from refinfer.clock import Clock, RealClock
from refinfer.errors import CacheFileError
from refinfer.offload.calibration import (
    CALIBRATION_FILE,
    CALIBRATION_VERSION,
    blas_name,
    device_number,
    read_json,
)
from refinfer.offload.prefetch import Prefetcher
from refinfer.offload.store import FileStore, Store
from refinfer.packing.formats import FORMATS, PackedMatrix, layout_of, pack_matrix
from refinfer.packing.layout import Bytes
from refinfer.packing.matmul import matmul, scratch_floats
from refinfer.packing.product import GemmScratch
from refinfer.planning.cost import Device, Processor
from refinfer.units import format_nbytes
from refinfer.weight_cache.directory import cache_directory
from refinfer.weight_cache.ownership import make_folder
from refinfer.weight_cache.publish import Draft, write_small_file

__all__ = ["BENCH", "calibrate", "fit_device", "processor_of", "product_rows", "read_rows", "to_json"]

CHUNK_SIZES: Final = (1 << 20, 2 << 20, 4 << 20)
THREADS: Final = (1, 2, 4)
ROWS_OF_X: Final = (1, 8, 64, 256)

_SOURCE: Final = "refinfer bench calibrate"
_FILE_BYTES: Final = 256 << 20
_RING: Final = 8
_ROUNDS: Final = 3
_SHAPE: Final = 512, 2048
_COLD_BYTES: Final = 96 << 20  # more than the processor's caches hold
_TINY: Final = 32, 32
_CALLS: Final = 200


def calibrate(
    progress: Progress = lambda: None,
    *,
    folder: Path | None = None,
    nbytes: int = _FILE_BYTES,
    rounds: int = _ROUNDS,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Measure this disk and this processor, write `calibration.json` into `folder`, and return the rows.

    None means the user's cache directory.

    Raises:
        CacheFileError: the cache directory cannot be written.
    """
    clock = clock or RealClock()
    folder = folder or cache_directory()
    place = folder / CALIBRATION_FILE
    rows = []
    try:
        make_folder(folder)
        for row in _reads_in(folder, nbytes, clock, rounds):
            rows.append(row)
            progress()
        with threadpool_limits(limits=1, user_api="blas"):
            one_call_s = _call_s(clock)
            for row in product_rows(tuple(FORMATS), clock, rounds):
                rows.append(row)
                progress()
        known = to_json(read_json(place), folder, fit_device(rows), processor_of(rows, one_call_s))
        write_small_file(place, (json.dumps(known, indent=1) + "\n").encode(), begin=b'{\n "version"')
    except OSError as error:
        raise CacheFileError(f"{folder} cannot be written: {error.strerror}") from None
    return {"calibration_file": str(place), "call_us": 1e6 * one_call_s, "rows": rows}


def _reads_in(folder: Path, nbytes: int, clock: Clock, rounds: int) -> Iterator[Row]:
    """Write a file of noise into a folder, and measure reads of it.

    It is a draft that is never published: if this process is killed, the next one to calibrate takes it over.
    """
    draft = Draft(folder / "calibration-noise")
    try:
        noise = np.random.default_rng(0).bytes(CHUNK_SIZES[-1])
        for at in range(0, nbytes // len(noise) * len(noise), len(noise)):
            draft.write(at, noise)
        with FileStore(draft.temporary) as store:
            yield from read_rows(store, nbytes, clock, rounds)
    finally:
        draft.abandon()


def to_json(known: Mapping[str, Any] | None, place: Path, device: Device, processor: Processor) -> dict[str, Any]:
    """Return the contents of `calibration.json` with this device and processor added to what was `known`."""
    kept = known if known is not None and known.get("version") == CALIBRATION_VERSION else {}
    disk = {"bandwidth": _with_text_keys(device.bandwidth), "latency_s": device.latency_s}
    seconds = {name: _with_text_keys(points) for name, points in processor.seconds_per_byte.items()}
    multiplier = {"seconds_per_byte": seconds, "call_s": processor.call_s}
    return {
        "version": CALIBRATION_VERSION,
        "devices": _section(kept, "devices") | {device_number(place): disk},
        "processors": _section(kept, "processors") | {blas_name(): multiplier},
    }


def _with_text_keys(points: Mapping[int, float]) -> dict[str, float]:
    return {str(n): value for n, value in points.items()}


def _section(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = known.get(name)
    return section if isinstance(section, dict) else {}


def read_rows(store: Store, nbytes: int, clock: Clock, rounds: int = _ROUNDS) -> Iterator[Row]:
    """Yield bytes per second of checked reads of the first `nbytes`, by chunk size and number of threads."""
    for size in CHUNK_SIZES:
        memory = aligned_empty((_RING * size // 4,), PAGE_BYTES).view(np.uint8)
        slots = [memory[i * size : (i + 1) * size] for i in range(_RING)]
        order = range(nbytes // size)

        def read(number: int, slot: Bytes, thread: int, size: int = size) -> Bytes:
            store.read(number * size, slot)
            zlib.crc32(slot.data)
            return slot

        for threads in THREADS:
            seconds = [_pass_s(Prefetcher(order, slots, read, threads), order, clock) for _ in range(rounds)]
            rate = len(order) * size / statistics.median(seconds)
            yield {"what": "read", "chunk_bytes": size, "prefetch_threads": threads, "gb_per_s": rate / 1e9}


def _pass_s(prefetcher: Prefetcher, order: Sequence[int], clock: Clock) -> float:
    started = clock.now()
    with closing(prefetcher):
        for number in order:
            prefetcher.release(prefetcher.take(number))
        return clock.now() - started


def fit_device(rows: Sequence[Mapping[str, Any]]) -> Device:
    """Return the device that fits `read_rows` best.

    A read of some bytes takes latency + bytes * threads / bandwidth. The latency is the intercept of a line through one
    thread's times for each size; the bandwidth for more threads is fitted to the largest size.
    """
    reads = [row for row in rows if row["what"] == "read"]
    one = {
        row["chunk_bytes"]: row["chunk_bytes"] / row["gb_per_s"] / 1e9 for row in reads if row["prefetch_threads"] == 1
    }
    _, start = np.polyfit(list(one), list(one.values()), 1)
    latency_s = float(np.clip(start, 0, min(one.values()) / 2))
    largest = max(one)
    bandwidth = {}
    for row in reads:
        if row["chunk_bytes"] == largest:
            in_flight = row["prefetch_threads"] * largest
            took_s = in_flight / row["gb_per_s"] / 1e9
            bandwidth[row["prefetch_threads"]] = in_flight / max(took_s - latency_s, took_s / 2)
    return Device("this disk", bandwidth, latency_s, _SOURCE)


def product_rows(names: Sequence[str], clock: Clock, rounds: int = _ROUNDS) -> Iterator[Row]:
    """Yield nanoseconds per byte of products with chunks that come from memory, by format and rows of x."""
    w = np.random.default_rng(0).standard_normal(_SHAPE, dtype=np.float32)
    for name in names:
        first = pack_matrix(w, name)
        nbytes = sum(map(len, first.buffers))
        copies = [
            PackedMatrix(first.layout, [buffer.copy() for buffer in first.buffers])
            for _ in range(_COLD_BYTES // nbytes)
        ]
        for M in ROWS_OF_X:
            some = copies[: max(2, len(copies) // M)]
            x, out = np.ones((M, w.shape[1]), np.float32), np.empty((M, w.shape[0]), np.float32)
            scratch = GemmScratch(scratch_floats({first.layout}, M))
            seconds = []
            for _ in range(rounds):
                started = clock.now()
                for packed in some:
                    matmul(x, packed.layout, packed.tiles, out, scratch)
                seconds.append((clock.now() - started) / len(some))
            taken = 1e9 * statistics.median(seconds) / nbytes
            yield {"what": "product", "format": name, "m": M, "chunk_bytes": nbytes, "ns_per_byte": taken}


def _call_s(clock: Clock) -> float:
    """Return the fixed seconds of a product, whatever its bytes: the time for a very small chunk."""
    packed = pack_matrix(np.ones(_TINY, np.float32), "f32")
    x, out = np.ones((1, _TINY[1]), np.float32), np.empty((1, _TINY[0]), np.float32)
    scratch = GemmScratch(scratch_floats({layout_of("f32", *_TINY)}, 1))
    started = clock.now()
    for _ in range(_CALLS):
        matmul(x, packed.layout, packed.tiles, out, scratch)
    return (clock.now() - started) / _CALLS


def processor_of(rows: Sequence[Mapping[str, Any]], call_s: float) -> Processor:
    """Return the processor with the costs in `product_rows`; the fixed cost of a call is subtracted from each."""
    seconds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["what"] == "product":
            whole = row["ns_per_byte"] / 1e9
            seconds.setdefault(row["format"], {})[row["m"]] = max(whole - call_s / row["chunk_bytes"], whole / 2)
    return Processor("this processor", seconds, call_s, _SOURCE)


BENCH: Final = Bench(
    summary="Measure reads and products here, for plan, simulate and budgets.",
    title="What reads and products cost here; plan, simulate and generate --budget use it from now on",
    steps=lambda: len(CHUNK_SIZES) * len(THREADS) + len(FORMATS) * len(ROWS_OF_X),
    measure=calibrate,
    columns={
        "what": lambda row: f"{row['what']} {row.get('format', '')}",
        "chunk": lambda row: format_nbytes(row["chunk_bytes"]),
        "threads, or rows of x": lambda row: str(row.get("prefetch_threads", row.get("m"))),
        "GB/s": lambda row: f"{row['gb_per_s'] if 'gb_per_s' in row else 1 / row['ns_per_byte']:.2f}",
    },
    keys=3,
    notes={
        "read": "with checksums, as the prefetch threads read: a file of 256 MiB in the cache directory",
        "product": "of packed weights that come from memory, with one BLAS thread",
    },
)
