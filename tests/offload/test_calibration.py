"""Specifies `refinfer.offload.calibration`: what reading and multiplying cost here is measured, kept and used."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refinfer.bench.calibrate import (
    CHUNK_SIZES,
    ROWS_OF_X,
    THREADS,
    calibrate,
    fit_device,
    processor_of,
    product_rows,
    read_rows,
    to_json,
)
from refinfer.cli.main import main
from refinfer.clock import RealClock
from refinfer.errors import RequestError
from refinfer.generate import load
from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint
from refinfer.offload.calibration import (
    CALIBRATION_FILE,
    blas_name,
    calibration_file,
    device_number,
    known_calibration,
    observed_calibration,
    product_seconds_per_byte,
    same_bits,
    slower,
)
from refinfer.offload.prediction import Prediction
from refinfer.offload.streamed import StreamedSource
from refinfer.packing.formats import FORMATS, pack_matrix
from refinfer.packing.matmul import matmul as packing_matmul
from refinfer.planning.cost import DEVICES, HERE, Calibration, Device, Processor
from refinfer.sources.matrices import Scratch

FAST = Device("d", {1: 2e9, 2: 3e9}, 1e-4, "a test")
EVEN = Processor("p", {name: {1: 1e-10, 256: 2e-9} for name in FORMATS}, 5e-6, "a test")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A calibration of this machine, with a small file."""
    folder = tmp_path_factory.mktemp("home")
    return folder, calibrate(folder=folder, nbytes=16 << 20, rounds=1)


@pytest.mark.spec("CAL-1")
def test_a_calibration_has_a_row_for_every_way_to_read_and_every_product(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = measured
    assert result["calibration_file"] == str(folder / CALIBRATION_FILE)
    reads = [(row["chunk_bytes"], row["prefetch_threads"]) for row in result["rows"] if row["what"] == "read"]
    assert reads == [(size, threads) for size in CHUNK_SIZES for threads in THREADS]
    products = [(row["format"], row["m"]) for row in result["rows"] if row["what"] == "product"]
    assert products == [(name, M) for name in FORMATS for M in ROWS_OF_X]
    assert all(row.get("gb_per_s", 1) > 0 and row.get("ns_per_byte", 1) > 0 for row in result["rows"])


@pytest.mark.spec("CAL-1")
def test_every_read_that_is_measured_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    class Checking:
        @staticmethod
        def crc32(data: memoryview) -> int:
            checked.append(data.nbytes)
            return zlib.crc32(data)

    class Endless:
        def read(self, offset: int, into: object) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr("refinfer.bench.calibrate.zlib", Checking)
    nbytes = 8 << 20
    rows = list(read_rows(Endless(), nbytes, RealClock(), 1))
    expected = [size for size in CHUNK_SIZES for _ in THREADS for _ in range(nbytes // size)]
    assert len(rows) == len(CHUNK_SIZES) * len(THREADS)
    for size in CHUNK_SIZES:  # prefetch threads may have read further, into the next pass
        assert checked.count(size) >= expected.count(size)


@pytest.mark.spec("CAL-1")
def test_what_a_byte_costs_is_the_median_time_of_a_product_divided_by_the_bytes_of_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock on which each product of a round takes as long as this test says."""

    class Told:
        products, looks = 0, 0
        seconds = (0.001, 0.004, 0.002)  # of a product, in each round

        def now(self) -> float:
            self.looks, products, self.products = self.looks + 1, self.products, 0
            # looked at before and after each round
            return products * self.seconds[(self.looks // 2 - 1) % 3] if self.looks % 2 == 0 else 0.0

        def sleep(self, seconds: float) -> None:
            raise AssertionError

    clock = Told()

    def matmul(x: Any, *_: object) -> None:
        clock.products += 1

    monkeypatch.setattr("refinfer.bench.calibrate._COLD_BYTES", 16 << 20)
    monkeypatch.setattr("refinfer.bench.calibrate.matmul", matmul)
    rows = list(product_rows(tuple(FORMATS), clock, rounds=3))
    assert len(rows) == len(FORMATS) * len(ROWS_OF_X)
    assert [row["ns_per_byte"] * row["chunk_bytes"] for row in rows] == pytest.approx([2e6] * len(rows))
    of_a_weight = {row["format"]: row["chunk_bytes"] / rows[0]["chunk_bytes"] for row in rows}
    assert of_a_weight == pytest.approx({"f32": 1, "bf16": 1 / 2, "int8": 1 / 4, "int4": 5 / 32}, rel=0.1)


@pytest.mark.spec("CAL-1", "CAL-3")
def test_what_was_measured_is_found_again_and_no_other_file_is_left(
    measured: tuple[Path, dict[str, Any]],
) -> None:
    folder, result = measured
    found = known_calibration(folder / CALIBRATION_FILE, folder / "not" / "there" / "yet")
    assert found.measured
    assert found.device.bandwidth == fit_device(result["rows"]).bandwidth
    processor = processor_of(result["rows"], result["call_us"] / 1e6)
    for name, points in processor.seconds_per_byte.items():
        assert found.processor.seconds_per_byte[name] == pytest.approx(points)
    assert [path.name for path in folder.iterdir()] == [CALIBRATION_FILE]


@pytest.mark.spec("CAL-1")
def test_other_disks_and_other_blas_builds_stay_in_the_file(tmp_path: Path) -> None:
    before = {"version": 1, "devices": {"999:999": {"bandwidth": {"1": 1.0}, "latency_s": 0}}, "processors": {"x": 1}}
    after = to_json(before, tmp_path, FAST, EVEN)
    assert set(after["devices"]) == {"999:999", device_number(tmp_path)}
    assert set(after["processors"]) == {"x", blas_name()}
    assert set(to_json({"version": 0, "devices": {"a": 1}}, tmp_path, FAST, EVEN)["devices"]) == {
        device_number(tmp_path)
    }


@pytest.mark.spec("CAL-1", "CAL-3")
def test_a_file_with_invalid_parts_is_replaced_by_a_valid_one(tmp_path: Path) -> None:
    after = to_json({"version": 1, "devices": 3, "processors": ["x"]}, tmp_path, FAST, EVEN)
    assert (list(after["devices"]), list(after["processors"])) == ([device_number(tmp_path)], [blas_name()])


@pytest.mark.spec("CAL-5")
def test_what_a_start_shows_scales_a_device_with_rates_for_other_numbers_of_threads_only() -> None:
    device = Device("d", {2: 3e9, 4: 4e9}, 0.0, "a test")
    assert observed_calibration(Calibration(device, EVEN), "f32", 1, 6e9, None).device.bandwidth == {2: 6e9, 4: 8e9}


@pytest.mark.spec("CAL-2")
def test_the_fit_recovers_the_device() -> None:
    device = Device("true", {1: 1.5e9, 2: 2.5e9, 4: 2.6e9}, 2e-4, "")
    rows = [
        {
            "what": "read",
            "chunk_bytes": size,
            "prefetch_threads": n,
            "gb_per_s": n * size / device.read_s(size, n) / 1e9,
        }
        for size in CHUNK_SIZES
        for n in (1, 2, 4)
    ]
    found = fit_device(rows)
    assert found.latency_s == pytest.approx(device.latency_s)
    assert found.bandwidth == pytest.approx(device.bandwidth)


@pytest.mark.spec("CAL-2")
def test_the_fit_stays_plausible_when_some_reads_were_held_up() -> None:
    rates = {(1 << 20, 1): 0.01, (2 << 20, 1): 0.02, (4 << 20, 1): 0.03, (4 << 20, 2): 9.0, (4 << 20, 4): 9.0}
    rows = [{"what": "read", "chunk_bytes": b, "prefetch_threads": n, "gb_per_s": r} for (b, n), r in rates.items()]
    found = fit_device(rows)
    assert found.latency_s >= 0
    assert all(9e9 <= found.bandwidth[n] <= 18e9 for n in (2, 4))


@pytest.mark.spec("CAL-2")
def test_what_a_call_costs_by_itself_is_not_counted_twice() -> None:
    rows = [{"what": "product", "format": "f32", "m": 1, "chunk_bytes": 10_000, "ns_per_byte": 3.0}]
    processor = processor_of(rows, 1e-5)
    assert processor.product_s("f32", 10_000, 1) == pytest.approx(3e-5)


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / CALIBRATION_FILE
    file.write_text(json.dumps(to_json(None, tmp_path, FAST, EVEN) | changes))
    return file


@pytest.mark.spec("CAL-3")
def test_disk_and_processor_are_found_each_by_its_own_key(tmp_path: Path) -> None:
    found = known_calibration(written(tmp_path), tmp_path)
    assert (found.device.bandwidth, found.device.latency_s) == (FAST.bandwidth, FAST.latency_s)
    assert found.processor.seconds_per_byte == EVEN.seconds_per_byte
    assert found.measured
    assert str(tmp_path / CALIBRATION_FILE) in found.device.source
    no_disk = known_calibration(written(tmp_path, devices={}), tmp_path)
    assert (no_disk.device, no_disk.measured) == (HERE.device, False)
    assert no_disk.processor.seconds_per_byte == EVEN.seconds_per_byte
    no_blas = known_calibration(written(tmp_path, processors={}), tmp_path)
    assert (no_blas.processor, no_blas.measured) == (HERE.processor, False)
    assert no_blas.device.bandwidth == FAST.bandwidth


NONSENSE: list[object] = [
    None, 1, "x", [], {}, {"bandwidth": {}, "latency_s": 0}, {"bandwidth": {"1": 0}, "latency_s": 0},
    {"bandwidth": {"1": -1}, "latency_s": 0}, {"bandwidth": {"x": 1}, "latency_s": 0},
    {"bandwidth": {"0": 1}, "latency_s": 0}, {"bandwidth": {"1": "fast"}, "latency_s": 0},
    {"bandwidth": {"1": 1e400}, "latency_s": 0}, {"bandwidth": {"1": 1e9}}, {"bandwidth": {"1": 1e9}, "latency_s": -1},
    {"seconds_per_byte": {}, "call_s": 0}, {"seconds_per_byte": {"f32": {"1": 1e-9}}, "call_s": 0},
    {"seconds_per_byte": {name: {} for name in FORMATS}, "call_s": 0},
    {"seconds_per_byte": {name: {"8": 1e-9} for name in FORMATS}, "call_s": 0},
    {"seconds_per_byte": {name: {"1": 0} for name in FORMATS}, "call_s": 0},
    {"seconds_per_byte": {name: {"1": 1e-9} for name in FORMATS}, "call_s": "none"},
    {"bandwidth": {"1": 10**400}, "latency_s": 0}, {"bandwidth": {"1": 1e9}, "latency_s": 10**400},
    {"bandwidth": {"1": 1e-300}, "latency_s": 0}, {"bandwidth": {"1": 1e300}, "latency_s": 0},
    {"bandwidth": {"1": True}, "latency_s": 0}, {"bandwidth": {"1": 1e9}, "latency_s": "0"},
    {"bandwidth": {"1": 1e9}, "latency_s": 1e300}, {"bandwidth": {"1": 1e9}, "latency_s": math.nan},
    {"bandwidth": {"٣": 1e9}, "latency_s": 0}, {"bandwidth": {"1": 1e9, "-1": 1e9}, "latency_s": 0},
    {"seconds_per_byte": {name: {"1": 1e-300} for name in FORMATS}, "call_s": 0},
    {"seconds_per_byte": {name: {"1": 1e300} for name in FORMATS}, "call_s": 0},
    {"seconds_per_byte": {name: {"1": 1e-9, "0": 1e-9} for name in FORMATS}, "call_s": 0},
    {"seconds_per_byte": {name: {"1": 1e-9} for name in FORMATS}, "call_s": 10**400},
]  # fmt: skip


@pytest.mark.spec("CAL-3")
@pytest.mark.parametrize("entry", NONSENSE, ids=range(len(NONSENSE)))
def test_invalid_entries_of_the_file_count_as_not_measured(entry: object, tmp_path: Path) -> None:
    file = written(tmp_path, devices={device_number(tmp_path): entry}, processors={blas_name(): entry})
    assert known_calibration(file, tmp_path) == HERE


@pytest.mark.spec("CAL-3", "INPUT-2")
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b"null",
        b'{"devices": 3, "processors": []}',
        b"[" * 100_000,
        b'{"version":' * 100_000,
        b"1" * 5000,
        b" " * 1_000_001,
    ],
    ids=range(11),
)
def test_a_file_that_is_missing_or_cannot_be_read_is_no_error(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / CALIBRATION_FILE
    if content is not None:
        file.write_bytes(content)
    assert known_calibration(file, tmp_path) == HERE


@pytest.mark.spec("CAL-3", "INPUT-1")
def test_a_fifo_in_place_of_the_file_is_no_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CALIBRATION_FILE)
    assert known_calibration(tmp_path / CALIBRATION_FILE, tmp_path) == HERE


@pytest.mark.spec("CAL-3")
def test_without_a_home_folder_nothing_is_measured_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    assert calibration_file() is None
    assert known_calibration(None, tmp_path) == HERE
    assert main(["plan", "--shape", "tiny"]) == 0
    assert "assuming" in capsys.readouterr().out
    with load(budget="90%", weight_cache=tmp_path / "w", max_positions=16) as session:
        assert session.prediction is not None


@pytest.mark.spec("CAL-4")
def test_a_named_device_comes_from_the_table_and_the_processor_from_the_file(tmp_path: Path) -> None:
    found = known_calibration(written(tmp_path), tmp_path, "emmc")
    assert (found.device, found.measured) == (DEVICES["emmc"], False)
    assert found.processor.seconds_per_byte == EVEN.seconds_per_byte
    with pytest.raises(RequestError, match="the device must be one of"):
        known_calibration(written(tmp_path), tmp_path, "floppy")


@pytest.mark.spec("CAL-4")
def test_a_throttled_disk_is_at_most_as_fast_as_its_rate() -> None:
    assert slower(HERE, None) is HERE
    assert slower(Calibration(FAST, EVEN), 2.5e9).device.bandwidth == {1: 2e9, 2: 2.5e9}
    assert slower(HERE, 1e6).assumed == ("processor",)
    assert slower(HERE, 1e12).assumed == ("disk", "processor")


@pytest.mark.spec("CAL-4")
def test_the_commands_use_what_was_calibrated_and_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "refinfer").mkdir()
    written(tmp_path / "refinfer")
    for command in ("plan", "simulate"):
        assert main([command, "--shape", "tiny", "--weights", "int8", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["measured"]
        assert told["processor_source"].startswith("refinfer bench calibrate")
        assert main([command, "--shape", "tiny"]) == 0
        assert "as measured here: refinfer bench calibrate" in capsys.readouterr().out
        assert main([command, "--shape", "tiny", "--device", "nvme"]) == 0
        assert "assuming: disk nvme" in capsys.readouterr().out
    assert main(["generate", "--budget", "70%", "--max-tokens", "2", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["generate", "--budget", "70%", "--max-tokens", "2"]) == 0
    assert "ideal" in (line := capsys.readouterr().err.splitlines()[-1])
    assert re.match(r"tokens/s: predicted [\d.,]+ \([\d.,]+ to [\d.,]+\), measured", line)


@pytest.mark.spec("CAL-5")
@pytest.mark.parametrize(("bytes_per_s", "seconds_per_byte"), [(None, None), (1e9, None), (None, 1e-9), (1e9, 1e-9)])
def test_a_start_counts_as_measured_only_if_it_showed_both_the_disk_and_the_processor(
    bytes_per_s: float | None, seconds_per_byte: float | None
) -> None:
    assumed = Calibration(FAST, EVEN)
    found = observed_calibration(assumed, "f32", 1, bytes_per_s, seconds_per_byte)
    assert found.measured == (bytes_per_s is not None and seconds_per_byte is not None)
    assert (found.device is FAST) == (bytes_per_s is None)
    assert (found.processor is EVEN) == (seconds_per_byte is None)


@pytest.mark.spec("CAL-5")
def test_products_that_took_no_time_or_were_none_show_nothing() -> None:
    inventory = Inventory(SHAPES["tiny"], "f32")

    class Still(RealClock):
        def now(self) -> float:
            return 1.0

    layout = inventory.matrices[inventory.cycle[0].matrix].layout
    tiles = pack_matrix(np.ones((layout.N, layout.K), np.float32), "f32").tiles
    assert product_seconds_per_byte(inventory, {0: tiles[0]}, Scratch(inventory, 1), Still()) is None
    assert product_seconds_per_byte(inventory, {}, Scratch(inventory, 1), RealClock()) is None


@pytest.mark.spec("CAL-5")
def test_what_a_start_shows_replaces_what_was_assumed() -> None:
    found = observed_calibration(Calibration(FAST, EVEN), "int8", 2, 6e9, 3e-10)
    assert found.device.bandwidth == {1: 4e9, 2: 6e9}  # the relation of the two stays
    assert found.processor.seconds_per_byte["int8"] == pytest.approx({1: 3e-10, 256: 6e-9})
    assert found.processor.seconds_per_byte["f32"] == EVEN.seconds_per_byte["f32"]
    assert found.measured
    nothing = observed_calibration(Calibration(FAST, EVEN), "int8", 2, None, None)
    assert nothing == Calibration(FAST, EVEN)


@pytest.mark.spec("CAL-5")
@pytest.mark.parametrize("name", FORMATS)
def test_products_with_chunks_in_memory_show_what_a_byte_of_weights_costs(name: str) -> None:
    inventory = Inventory(SHAPES["tiny"], name)
    rng = np.random.default_rng(0)
    packed = [
        pack_matrix(rng.standard_normal((m.layout.N, m.layout.K), dtype=np.float32), name) for m in inventory.matrices
    ]
    chunks = {i: packed[c.matrix].tiles[c.index] for i, c in enumerate(inventory.cycle)}
    seconds = product_seconds_per_byte(inventory, chunks, Scratch(inventory, 1), RealClock())
    assert seconds is not None
    assert 0 < seconds < 1e-3
    assert product_seconds_per_byte(inventory, {}, Scratch(inventory, 1), RealClock()) is None


@pytest.mark.spec("CAL-5")
def test_products_are_timed_for_a_tenth_of_a_second_at_most() -> None:
    class Slow:
        def __init__(self) -> None:
            self.t = 0.0

        def now(self) -> float:
            self.t += 0.03
            return self.t

        def sleep(self, seconds: float) -> None:
            raise AssertionError

    inventory = Inventory(SHAPES["tiny"], "f32")
    first = inventory.matrices[0].layout
    w = pack_matrix(np.ones((first.N, first.K), np.float32), "f32")
    alike = [i for i, chunk in enumerate(inventory.cycle) if inventory.matrices[chunk.matrix].layout == first]
    clock = Slow()
    assert len(alike) > 4
    assert product_seconds_per_byte(inventory, dict.fromkeys(alike, w.tiles[0]), Scratch(inventory, 1), clock)
    assert clock.t == pytest.approx(4 * 2 * 0.03)  # the fourth product is the one that goes beyond


@pytest.mark.spec("CAL-5")
def test_a_few_small_chunks_are_multiplied_again_until_enough_is_measured() -> None:
    """The first product is slow here, as it is while weights are on their way into caches; the others are not."""

    class Warming:
        def __init__(self) -> None:
            self.t, self.looks = 0.0, 0

        def now(self) -> float:
            self.looks += 1
            self.t += 0.05 if self.looks == 2 else 0.001
            return self.t

        def sleep(self, seconds: float) -> None:
            raise AssertionError

    inventory, clock = Inventory(SHAPES["tiny"], "f32"), Warming()
    layout = inventory.matrices[0].layout
    tiles = pack_matrix(np.ones((layout.N, layout.K), np.float32), "f32").tiles[0]
    seconds = product_seconds_per_byte(inventory, {0: tiles}, Scratch(inventory, 1), clock)
    assert seconds is not None
    assert clock.looks >= 2 * 10
    assert seconds * layout.chunks[0].nbytes < 0.05 / 10


@pytest.mark.spec("CAL-5", "CAL-6")
def test_only_a_run_under_a_budget_has_a_prediction(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"], dtype="f32")
    with load(tmp_path / "m", weight_cache=tmp_path / "w", budget="90%", max_positions=8) as session:
        assert session.prediction is not None
        assert session.prediction.token_s > 0
    with load(tmp_path / "m", weight_cache=tmp_path / "w", max_positions=8) as session:
        assert session.prediction is None


@pytest.mark.spec("CAL-6")
@pytest.mark.parametrize(("threads", "chosen"), [(None, 1), (2, 2)])
def test_a_run_that_waits_for_the_disk_multiplies_with_one_thread(
    threads: int | None, chosen: int, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "m", SHAPES["tiny"], dtype="f32")
    for _ in range(2):
        with load(
            tmp_path / "m",
            weight_cache=tmp_path / "w",
            budget="90%",
            disk_bandwidth=1e6,
            threads=threads,
            max_positions=8,
        ) as session:
            assert session.prediction is not None
            assert session.prediction.io_bound
            assert session.threads == chosen


@pytest.mark.spec("CAL-11")
@pytest.mark.parametrize("weights", FORMATS)
def test_a_product_with_other_bits_is_noticed(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SHAPES["tiny"]
    write_checkpoint(tmp_path / "model", config, dtype="f32", seed=1)
    with load(
        tmp_path / "model", weights=weights, weight_cache=tmp_path / "packed", budget="2MB", max_positions=8
    ) as session:
        source = session.source
        assert isinstance(source, StreamedSource)
        inventory = Inventory(session.model.config, weights)
        assert same_bits(inventory, source.locked, source.scratch, 2)
        right, calls = packing_matmul, []

        def matmul(x: Any, layout: Any, chunks: Any, out: Any, scratch: Any) -> None:
            right(x, layout, chunks, out, scratch)
            calls.append(1)
            if len(calls) % 2 == 0:  # the one with several threads
                out[0, -1] = np.nextafter(out[0, -1], np.float32(np.inf))

        monkeypatch.setattr("refinfer.offload.calibration.matmul", matmul)
        assert not same_bits(inventory, source.locked, source.scratch, 2)


@pytest.mark.spec("CAL-11", "CAL-9", "GEN-2")
@pytest.mark.parametrize(("io_bound", "asked", "tried"), [(False, None, True), (True, None, False), (False, 2, False)])
def test_a_session_tries_blas_threads_if_products_are_the_limit_and_no_number_was_asked_for(
    io_bound: bool, asked: int | None, tried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinfer.generate.default_threads", lambda _: 2)
    monkeypatch.setattr("refinfer.offload.run.predict", lambda *_, **__: Prediction(1.0, io_bound, HERE))
    write_checkpoint(tmp_path / "model", SHAPES["tiny"], dtype="f32", seed=1)
    texts, estimates = [], []
    with load(
        tmp_path / "model", weight_cache=tmp_path / "packed", budget="90%", threads=asked, max_positions=10
    ) as session:
        for _ in range(2):
            for _ in session.generate(token_ids=[1], max_tokens=9):
                pass
            assert session.stats is not None
            texts.append(session.stats.token_ids)
            assert session.stats.offload is not None
            estimates.append(session.stats.offload.estimated_tokens_per_s)
        assert (session._trial is not None) == tried
        assert session._trial is None or session._trial.is_over
        assert session._trial is None or session._trial.threads in {1, 2}
        assert session.threads == (2 if tried else asked or 1)  # that of every prompt
    assert texts[0] == texts[1]
    assert [estimate is None for estimate in estimates] == [tried, False]  # turns do not count


@pytest.mark.spec("CAL-5")
def test_what_is_timed_is_a_product_with_each_chunk_and_one_row_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, seen = Inventory(SHAPES["tiny"], "f32"), []

    def noted(x: Any, layout: Any, chunks: Any, out: Any, scratch: Any) -> None:
        packing_matmul(x, layout, chunks, out, scratch)
        seen.append((x.shape[0], id(chunks[0])))

    monkeypatch.setattr("refinfer.offload.calibration.matmul", noted)
    layouts = [inventory.matrices[inventory.cycle[n].matrix].layout for n in (0, 1)]
    chunks = {
        n: pack_matrix(np.ones((layout.N, layout.K), np.float32), "f32").tiles[0] for n, layout in enumerate(layouts)
    }
    assert product_seconds_per_byte(inventory, chunks, Scratch(inventory, 1), RealClock())
    assert set(seen) == {(1, id(tiles)) for tiles in chunks.values()}
