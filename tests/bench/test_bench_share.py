"""The bench of sharing. Speed itself is never judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from refinfer.bench import share
from refinfer.model.config import SHAPES


@pytest.mark.slow
@pytest.mark.spec("BENCH-10")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports proportional set sizes")
def test_bench_share_measures_processes_that_live_at_once() -> None:
    config = replace(SHAPES["tiny"], vocab_size=40_000)  # ten megabytes in float32
    rows = list(share.share_rows(config))
    assert [(r["format"], r["mapped"], r["processes"]) for r in rows] == [
        (name, mapped, n) for name in ("f32", "bf16") for mapped in (True, False) for n in (1, 2, 4)
    ]
    pss = {(r["format"], r["mapped"], r["processes"]): r["pss_bytes"] for r in rows}
    shared, own = pss["f32", True, 4], pss["f32", False, 4]
    assert own - shared > 5_000_000  # three quarters of ten megabytes, and some
