"""What reading and multiplying cost on this machine, kept in a file for later runs.

Reads the entries of `calibration.json`, and derives costs from the start of a run that has no entry. Leaves to others:
measuring and writing the file (`bench.calibrate`), plans.
Read more: tutorial 11; clauses CAL-1 to CAL-6, CAL-11.

    calibration.json, in the cache directory, written by `refinfer bench calibrate`:

    {"version": 1,
     "devices":    {"8:1": {"bandwidth": {"1": bytes/s, "2": ...}, "latency_s"}},       by device number
     "processors": {"openblas 0.3.31 SkylakeX ...": {"seconds_per_byte": {"f32": {"1": ...}}, "call_s"}}}   by BLAS
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from refinfer.blas_threads import blas_libraries, blas_threads
from refinfer.clock import Clock
from refinfer.errors import InputError
from refinfer.inventory import Inventory
from refinfer.packing.layout import Tiles
from refinfer.packing.matmul import matmul
from refinfer.planning.cost import HERE, Calibration, Device, Processor, calibration_of
from refinfer.sources.matrices import Scratch
from refinfer.units import parse_integer
from refinfer.weight_cache.directory import cache_directory
from refinfer.whole_file import read_json as read_json_file

__all__ = [
    "CALIBRATION_FILE",
    "CALIBRATION_VERSION",
    "blas_name",
    "calibration_file",
    "device_number",
    "known_calibration",
    "observed_calibration",
    "product_seconds_per_byte",
    "read_json",
    "slower",
]

CALIBRATION_FILE: Final = "calibration.json"
CALIBRATION_VERSION: Final = 1
_MEASURE_S: Final = 0.1
_FEW_BYTES: Final = 32 << 20  # products with less than this are measured more than once
_AGAIN: Final = 20
_LARGEST_FILE_BYTES: Final = 1_000_000  # an entry takes about 1000
_RATES: Final = 1.0, 1e15  # bytes per second, from the slowest to the fastest that is believed
_LONGEST_S: Final = 60.0


def calibration_file() -> Path | None:
    """Return the path of this user's calibration file, or None if there is no cache directory."""
    try:
        return cache_directory() / CALIBRATION_FILE
    except InputError:
        return None


def device_number(place: Path) -> str:
    """Return the number of the device that holds `place`, or its nearest existing parent."""
    while not place.exists():
        place = place.parent
    number = place.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}" if hasattr(os, "major") else str(number)


def blas_name() -> str:
    """Return what numpy multiplies with: the library, its version, its target processor, and numpy's version."""
    libraries = [
        " ".join(str(part) for part in (info["internal_api"], info.get("version"), info.get("architecture")) if part)
        for info in blas_libraries()
    ]
    return ", ".join([*libraries, f"numpy {np.__version__}"])


def read_json(file: Path | None) -> dict[str, Any] | None:
    """Return the contents of a calibration file, or None if it is missing or unreadable."""
    if file is None:
        return None
    try:
        raw = read_json_file(file, _LARGEST_FILE_BYTES)
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def known_calibration(file: Path | None, place: Path, device: str | None = None) -> Calibration:
    """Return what is known about the disk under `place` and about this processor.

    Missing or invalid entries of `file` fall back to those of `planning.cost`. A `device` is looked up in its table
    `DEVICES` instead.

    Raises:
        RequestError: there is no such device.
    """
    assumed = calibration_of(device)
    raw = read_json(file) or {}
    processor = _processor_of(raw, file)
    disk = _device_of(raw, file, place) if device is None else None
    return Calibration(
        disk or assumed.device,
        processor or assumed.processor,
        measured=disk is not None and processor is not None,
    )


def _between(least: float, value: object, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise ValueError("it is not a number, or cannot be true")
    return float(value)  # type: ignore[arg-type]


def _device_of(raw: Mapping[str, Any], file: Path | None, place: Path) -> Device | None:
    try:
        number = device_number(place)
        entry = raw["devices"][number]
        slowest, fastest = _RATES
        bandwidth = {parse_integer(n): _between(slowest, rate, fastest) for n, rate in entry["bandwidth"].items()}
        latency_s = _between(0, entry["latency_s"], _LONGEST_S)
        if not bandwidth or min(bandwidth) < 1:
            return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return Device(f"device {number}", bandwidth, latency_s, f"refinfer bench calibrate, {file}")


def _processor_of(raw: Mapping[str, Any], file: Path | None) -> Processor | None:
    try:
        entry = raw["processors"][blas_name()]
        slowest, fastest = _RATES
        measured = {name: entry["seconds_per_byte"][name] for name in HERE.processor.seconds_per_byte}
        seconds = {
            name: {parse_integer(M): _between(1 / fastest, s, 1 / slowest) for M, s in points.items()}
            for name, points in measured.items()
        }
        call_s = _between(0, entry["call_s"], _LONGEST_S)
        if {min(points, default=0) for points in seconds.values()} != {1}:
            return None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return Processor("this processor, one BLAS thread", seconds, call_s, f"refinfer bench calibrate, {file}")


def slower(calibration: Calibration, bytes_per_s: float | None) -> Calibration:
    """Return a calibration whose disk gives no more than `bytes_per_s`."""
    if bytes_per_s is None:
        return calibration
    device = calibration.device
    bandwidth = {n: min(rate, bytes_per_s) for n, rate in device.bandwidth.items()}
    source = f"limited to {bytes_per_s:g} bytes per second" if min(bandwidth.values()) == bytes_per_s else device.source
    return replace(calibration, device=replace(device, bandwidth=bandwidth, source=source))


def observed_calibration(
    assumed: Calibration, format: str, at_once: int, bytes_per_s: float | None, seconds_per_byte: float | None
) -> Calibration:
    """Return `assumed`, corrected by what the start of a run showed.

    `bytes_per_s` is how fast locked chunks were read with `at_once` reads under way; rates for other numbers of reads
    change by the same factor. `seconds_per_byte` is what products with one row cost; costs for more rows change
    likewise. Whatever is None stays as assumed.
    """
    device, processor = assumed.device, assumed.processor
    if bytes_per_s:
        ratio = bytes_per_s / device.rate(at_once)
        bandwidth = {n: rate * ratio for n, rate in device.bandwidth.items()}
        device = Device("this disk", bandwidth, 0.0, "as the locked chunks were read at this start")
    if seconds_per_byte:
        of_format = processor.seconds_per_byte[format]
        ratio = seconds_per_byte / of_format[1]
        seconds = {M: s * ratio for M, s in of_format.items()}
        source = "as it multiplied locked chunks at this start"
        processor = Processor("this processor", {**processor.seconds_per_byte, format: seconds}, 0.0, source)
    return Calibration(device, processor, measured=bool(bytes_per_s and seconds_per_byte))


def product_seconds_per_byte(
    inventory: Inventory, chunks: Mapping[int, Tiles], scratch: Scratch, clock: Clock
) -> float | None:
    """Return the seconds per byte of products with one row of x, from products with these chunks for about 0.1 s.

    A few small chunks are multiplied again and again: the first time, everything is still on its way into caches.
    """
    spent, nbytes = 0.0, 0
    few = sum(inventory.cycle[number].padded_nbytes for number in chunks) < _FEW_BYTES
    for number, tiles in [*chunks.items()] * (_AGAIN if few else 1):
        used = inventory.cycle[number]
        layout = inventory.matrices[used.matrix].layout.alone(used.index)
        x, out = np.ones((1, layout.K), np.float32), np.empty((1, layout.N), np.float32)
        started = clock.now()
        matmul(x, layout, [tiles], out, scratch.of(1))
        spent += clock.now() - started
        nbytes += layout.chunks[0].nbytes
        if spent > _MEASURE_S:
            break
    return spent / nbytes if nbytes and spent > 0 else None


def same_bits(inventory: Inventory, chunks: Mapping[int, Tiles], scratch: Scratch, threads: int) -> bool:
    """Return whether one BLAS thread and several give the same bits, by a product with a chunk of each shape.

    A BLAS may add in another order with more threads. Where it does, a choice by time would change a text by chance.
    """
    kinds = {(inventory.cycle[n].kind, inventory.cycle[n].padded_nbytes): n for n in chunks}
    for number in kinds.values():
        used = inventory.cycle[number]
        layout = inventory.matrices[used.matrix].layout.alone(used.index)
        x = np.linspace(-1, 1, layout.K, dtype=np.float32)[None]
        outs = []
        for n in (1, threads):
            out = np.empty((1, layout.N), np.float32)
            with blas_threads.limited(n):
                matmul(x, layout, [chunks[number]], out, scratch.of(1))
            outs.append(out)
        if not np.array_equal(outs[0], outs[1]):
            return False
    return True
