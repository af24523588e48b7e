"""The bench of packing. Speed itself is never judged."""

from __future__ import annotations

import json

import pytest

from refinfer.bench import pack
from refinfer.cli.main import main
from refinfer.packing.formats import FORMATS


@pytest.mark.spec("BENCH-7")
def test_bench_pack_prints_a_row_for_every_packer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(pack.pack_bench_rows((64, 96), rounds=1))
    assert {row["format"] for row in rows} == {*FORMATS, "f32-nr16-kr1", "f32-nr32-kr1", "f32-nr8-kr4"}
    assert all(row["ratio_to_copy"] > 0 and row["gb_per_s"] > 0 for row in rows)
    monkeypatch.setattr(pack, "pack_bench_rows", lambda progress: rows)
    assert main(["bench", "pack", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert main(["bench", "pack"]) == 0
    assert "f32-nr32-kr1" in capsys.readouterr().out
