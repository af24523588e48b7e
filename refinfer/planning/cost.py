"""What reading and multiplying cost, in seconds; and the bounds that follow from that alone.

Describes devices and processors, and names the command or the document behind each figure. Leaves to others: plans,
threads.
Read more: tutorial 11; clauses COST-1 to COST-5.

    read       latency + bytes * n / bandwidth(n)                 while n reads are under way
    product    bytes * seconds_per_byte(format, M)                of a chunk with M rows of x
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from refinfer.arrays import BoolArray, Float64Array
from refinfer.errors import RequestError
from refinfer.inventory import Inventory
from refinfer.packing.formats import FORMATS
from refinfer.planning.simulate import Unit

__all__ = [
    "DEVICES",
    "HERE",
    "PREFETCH_THREADS",
    "Calibration",
    "Costs",
    "Device",
    "Processor",
    "calibration_of",
    "costs_of",
    "ideal_token_s",
    "units_of",
    "window_tax",
]

PREFETCH_THREADS: Final = 2
"""The usual number of prefetch threads: while one checks what it has read, the other keeps the disk busy."""


@dataclass(frozen=True, slots=True)
class Device:
    """What weights are read from: bytes per second by the number of reads under way, seconds before a read begins.

    `source` names where the figures come from.
    """

    name: str
    bandwidth: Mapping[int, float]
    latency_s: float
    source: str

    def read_s(self, nbytes: int, at_once: int) -> float:
        """Return the seconds that one read of `nbytes` takes while `at_once` reads are under way."""
        return self.latency_s + nbytes * at_once / self.rate(at_once)

    def rate(self, at_once: int) -> float:
        """Return the bytes per second of all reads together: the entry for the largest count not above `at_once`."""
        return self.bandwidth[max((n for n in self.bandwidth if n <= at_once), default=min(self.bandwidth))]


@dataclass(frozen=True, slots=True)
class Processor:
    """What multiplies: seconds for each packed byte, by format and number of rows of x.

    Between two measured numbers of rows a straight line is drawn. `call_s` is added for each chunk, whatever its size.
    """

    name: str
    seconds_per_byte: Mapping[str, Mapping[int, float]]
    call_s: float
    source: str

    def product_s(self, format: str, nbytes: int, M: int) -> float:
        """Return the seconds that M rows of x take with a chunk of `nbytes`."""
        points = sorted(self.seconds_per_byte[format].items())
        if len(points) == 1:
            return self.call_s + nbytes * points[0][1]
        counts = [count for count, _ in points]
        i = min(max(bisect_left(counts, M), 1), len(points) - 1)
        (m0, s0), (m1, s1) = points[i - 1], points[i]
        per_byte = s0 + (s1 - s0) * (M - m0) / (m1 - m0)
        return self.call_s + nbytes * max(per_byte, 0.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A device and a processor; `measured` is false unless both were measured on this machine."""

    device: Device
    processor: Processor
    measured: bool = False

    @property
    def assumed(self) -> tuple[str, ...]:
        """What comes from this page's tables instead of this machine: `disk`, `processor`, both or neither."""
        tables = {device.source for device in DEVICES.values()} | {HERE.processor.source}
        return tuple(n for n, p in (("disk", self.device), ("processor", self.processor)) if p.source in tables)


def _disk(name: str, gb_per_s: float, latency_us: float, source: str) -> Device:
    return Device(name, MappingProxyType({1: gb_per_s * 1e9}), latency_us * 1e-6, source)


DEVICES: Final[Mapping[str, Device]] = MappingProxyType(
    {
        device.name: device
        for device in (
            _disk("emmc", 0.3, 200, "eMMC 5.1, JESD84-B51: HS400 carries 400 MB/s; about 300 are reached"),
            _disk("ufs-3.1", 2.1, 100, "UFS 3.1, sequential reads of 2,100 MB/s as its makers state"),
            _disk("ufs-4.0", 4.2, 80, "UFS 4.0, sequential reads of 4,200 MB/s as its makers state"),
            _disk("sata-ssd", 0.55, 80, "SATA 3.2: 6 Gbit/s carry 550 MB/s"),
            _disk("nvme", 3.5, 60, "PCIe 3.0 x4: 3,500 MB/s, as makers of such drives state"),
            Device(
                "virtual-disk",
                MappingProxyType({1: 2.14e9, 2: 2.54e9, 4: 2.68e9, 8: 2.73e9}),
                60e-6,
                "a virtual disk such as that of the figures page, direct reads of 1 to 4 MiB, measured on 2026-11-21",
            ),
        )
    }
)
"""Disks by name. Bandwidths are sequential reads; what a phone keeps up when it is warm may be less."""

HERE: Final = Calibration(
    DEVICES["virtual-disk"],
    Processor(
        "one core of the figures page",
        MappingProxyType(
            {
                name: MappingProxyType({M: ns * 1e-9 for M, ns in page.nanoseconds_per_byte.items()})
                for name, page in FORMATS.items()
            }
        ),
        10e-6,
        "refinfer bench matmul, docs/figures/matmul.json, 4096 square",
    ),
)
"""What is assumed if nothing was measured: this project's own processor and disk."""


def calibration_of(device: str | None) -> Calibration:
    """Return the default calibration, with another disk if `device` names one.

    Raises:
        RequestError: there is no such device.
    """
    if device is None:
        return HERE
    if device not in DEVICES:
        raise RequestError(f"the device must be one of {', '.join(DEVICES)}, not {device!r}")
    return Calibration(DEVICES[device], HERE.processor)


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """Seconds to read and to compute each chunk of a cycle."""

    read_s: Float64Array
    compute_s: Float64Array

    def reads(self, locked: BoolArray) -> Float64Array:
        """Return the seconds to read each chunk, 0 for those that are locked."""
        return np.where(locked, 0.0, self.read_s)


def costs_of(
    inventory: Inventory, calibration: Calibration, *, M: int = 1, prefetch_threads: int = PREFETCH_THREADS
) -> Costs:
    """Return what each chunk of a model's cycle costs, for M tokens at a time."""
    sizes, at_once = inventory.different_sizes, max(prefetch_threads, 1)
    read_s = [calibration.device.read_s(nbytes, at_once) for nbytes in sizes]
    compute_s = [calibration.processor.product_s(inventory.format, nbytes, M) for nbytes in sizes]
    which = np.searchsorted(sizes, inventory.sizes)
    return Costs(np.array(read_s)[which], np.array(compute_s)[which])


def units_of(inventory: Inventory, costs: Costs, locked: BoolArray) -> list[Unit]:
    """Return a cycle as units for `simulate`; locked chunks are not read."""
    return [
        Unit(read_s, compute_s, chunk.layer, chunk.kind)
        for chunk, read_s, compute_s in zip(
            inventory.cycle, costs.reads(locked).tolist(), costs.compute_s.tolist(), strict=True
        )
    ]


def ideal_token_s(costs: Costs, locked: BoolArray, prefetch_threads: int = PREFETCH_THREADS) -> float:
    """Return the seconds no run with these locks can beat: all products or all reads (by all threads), the longer."""
    # `cumsum` adds one after another, as a loop does; `sum` would round otherwise, and a tie might go to another plan.
    computing, reading = (float(np.cumsum(seconds)[-1]) for seconds in (costs.compute_s, costs.reads(locked)))
    return max(computing, reading / max(prefetch_threads, 1))


def window_tax(layers: int, window: int) -> float:
    """Return how many times more is streamed because a window of whole layers takes its share of the budget.

    Of N layers of L bytes each, l bytes are locked and L - l stream; a window has buffers for w layers' stream. With a
    budget of B bytes for both, `N * (L - l) = (N * L - B) * N / (N - w)` bytes stream, instead of `N * L - B`.

    Examples:
        >>> round(window_tax(24, 3), 3)
        1.143
    """
    if not 0 <= window < layers:
        raise RequestError(f"a window must be shorter than the {layers} layers, not {window}")
    return layers / (layers - window)
