"""What reading and multiplying cost on this machine: measured, and kept in a file for the next time.

Knows: `calibration.json`, what a start shows by itself. Does not know: plans; clock and places are handed in.
Spec: CAL-1 to CAL-6. Tutorial: 11.

    calibration.json in the cache directory, written by `refinfer bench calibrate`:

    {"version": 1,
     "devices":    {"8:1": {"bandwidth": {"1": bytes/s, "2": ...}, "latency_s"}},       by device number
     "processors": {"openblas 0.3.31 SkylakeX ...": {"seconds_per_byte": {"f32": {"1": ...}}, "call_s"}}}   by BLAS
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from threadpoolctl import threadpool_info

from refinfer.errors import InputError
from refinfer.offload.cost import HERE, Calibration, Device, Processor, calibration_of
from refinfer.offload.inventory import Inventory
from refinfer.offload.matrices import Scratch
from refinfer.packing.layout import Bytes
from refinfer.packing.matmul import matmul
from refinfer.trace import Clock
from refinfer.weight_cache.directory import cache_directory

__all__ = [
    "CALIBRATION_FILE",
    "blas_name",
    "calibration_file",
    "device_number",
    "known_calibration",
    "observed_calibration",
    "product_seconds_per_byte",
    "read_json",
    "slower",
    "to_json",
]

CALIBRATION_FILE: Final = "calibration.json"
_VERSION: Final = 1
_MEASURE_S: Final = 0.1


def calibration_file() -> Path | None:
    """Return where calibrations of this user's machine are kept; None where there is no folder for them."""
    try:
        return cache_directory() / CALIBRATION_FILE
    except InputError:
        return None


def device_number(place: Path) -> str:
    """Return the number of the device that holds `place`, or would: that of its nearest folder there is."""
    while not place.exists():
        place = place.parent
    number = place.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}" if hasattr(os, "major") else str(number)


def blas_name() -> str:
    """Return what numpy multiplies with: library, version, the processor it is built for, and numpy itself."""
    libraries = [
        " ".join(str(part) for part in (info["internal_api"], info.get("version"), info.get("architecture")) if part)
        for info in threadpool_info()
        if info["user_api"] == "blas"
    ]
    return ", ".join([*libraries, f"numpy {np.__version__}"])


def to_json(known: Mapping[str, Any] | None, place: Path, device: Device, processor: Processor) -> dict[str, Any]:
    """Return what `calibration.json` holds once this device and this processor are in it, beside what was `known`."""
    kept = known if known is not None and known.get("version") == _VERSION else {}
    return {
        "version": _VERSION,
        "devices": _section(kept, "devices")
        | {
            device_number(place): {
                "bandwidth": {str(n): rate for n, rate in device.bandwidth.items()},
                "latency_s": device.latency_s,
            }
        },
        "processors": _section(kept, "processors")
        | {
            blas_name(): {
                "seconds_per_byte": {
                    name: {str(M): seconds for M, seconds in points.items()}
                    for name, points in processor.seconds_per_byte.items()
                },
                "call_s": processor.call_s,
            }
        },
    }


def _section(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = known.get(name)
    return section if isinstance(section, dict) else {}


def read_json(file: Path | None) -> dict[str, Any] | None:
    """Return what a calibration file holds; None where there is none, or none that can be read."""
    if file is None:
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def known_calibration(file: Path | None, place: Path, device: str | None = None) -> Calibration:
    """Return what is known of the disk under `place` and of this processor.

    What `file` does not tell, or tells nonsense of, comes from `offload.cost`; a `device` named is one of its table.

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


def _positive(value: object) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value} is no such measure")
    return float(value)


def _device_of(raw: Mapping[str, Any], file: Path | None, place: Path) -> Device | None:
    try:
        number = device_number(place)
        entry = raw["devices"][number]
        bandwidth = {int(n): _positive(rate) for n, rate in entry["bandwidth"].items()}
        latency_s = float(entry["latency_s"])
        if not bandwidth or min(bandwidth) < 1 or not 0 <= latency_s < math.inf:
            return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return Device(f"device {number}", bandwidth, latency_s, f"refinfer bench calibrate, {file}")


def _processor_of(raw: Mapping[str, Any], file: Path | None) -> Processor | None:
    try:
        entry = raw["processors"][blas_name()]
        seconds = {
            name: {int(M): _positive(entry["seconds_per_byte"][name][M]) for M in entry["seconds_per_byte"][name]}
            for name in HERE.processor.seconds_per_byte
        }
        call_s = float(entry["call_s"])
        if not all(1 in points for points in seconds.values()) or not 0 <= call_s < math.inf:
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
    return replace(calibration, device=replace(device, bandwidth=bandwidth))


def observed_calibration(
    assumed: Calibration, name: str, readers: int, bytes_per_s: float | None, seconds_per_byte: float | None
) -> Calibration:
    """Return what a start has shown: the rate at which locked chunks came, the cost of products with one row of x.

    What it has not shown stays as assumed; rates of other numbers of readers keep their relation to the one seen.
    """
    device, processor = assumed.device, assumed.processor
    if bytes_per_s:
        ratio = bytes_per_s / device.rate(readers)
        bandwidth = {n: rate * ratio for n, rate in device.bandwidth.items()}
        device = Device("this disk", bandwidth, 0.0, "as the locked chunks were read at this start")
    if seconds_per_byte:
        of_format = processor.seconds_per_byte[name]
        ratio = seconds_per_byte / of_format[1]
        seconds = {M: s * ratio for M, s in of_format.items()}
        source = "as it multiplied locked chunks at this start"
        processor = Processor("this processor", {**processor.seconds_per_byte, name: seconds}, 0.0, source)
    return Calibration(device, processor, measured=bool(bytes_per_s and seconds_per_byte))


def product_seconds_per_byte(
    inventory: Inventory, chunks: Mapping[int, Bytes], scratch: Scratch, clock: Clock
) -> float | None:
    """Return what a byte of weights costs with one row of x: chunks in memory are multiplied, for 0.1 s at most."""
    spent, nbytes = 0.0, 0
    for number, chunk in chunks.items():
        used = inventory.cycle[number]
        layout = inventory.matrices[used.matrix].layout.alone(used.index)
        x, out = np.ones((1, layout.K), np.float32), np.empty((1, layout.N), np.float32)
        started = clock.now()
        matmul(x, layout, [layout.tiles(chunk, layout.chunks[0])], out, scratch.of(1))
        spent += clock.now() - started
        nbytes += len(chunk)
        if spent > _MEASURE_S:
            break
    return spent / nbytes if nbytes and spent > 0 else None
