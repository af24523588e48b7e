"""The command `synth`: what it writes, and that an interrupt leaves no files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_line import program, refused, run
from refinfer.model.config import SHAPES
from refinfer.model.synth import write_checkpoint


@pytest.mark.spec("CLI-5", "SYNTH-4")
def test_ctrl_c_while_writing_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with subprocess.Popen(program("synth", str(folder), "--shape", "llama-1b"), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while not folder.exists() or not any(folder.iterdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"refinfer: interrupted\n"
    assert process.returncode == 130
    assert not folder.exists()


@pytest.mark.spec("CLI-6")
def test_synth_writes_a_checkpoint_that_generate_reads(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    status, out, err = run("synth", folder, "--shape", "tiny", "--dtype", "f16", "--shard-size", "100kB", "--seed", 3)
    assert (status, out) == (0, "")
    assert "tiny, 214,592 parameters, 429 kB in f16" in err
    status, out, _ = run("generate", "hello", "--model", folder, "--max-tokens", 4, "--json")
    assert (status, len(json.loads(out)["token_ids"])) == (0, 4)
    write_checkpoint(tmp_path / "same", SHAPES["tiny"], dtype="f16", shard_nbytes=100_000, seed=3)
    written, same = ({path.name: path.read_bytes() for path in made.iterdir()} for made in (folder, tmp_path / "same"))
    assert written == same


@pytest.mark.spec("CLI-6")
def test_the_seed_of_a_checkpoint_is_zero_unless_another_is_given(tmp_path: Path) -> None:
    def made(*seed: object) -> bytes:
        folder = tmp_path / f"m{seed}"
        assert run("synth", folder, "--shape", "tiny", *seed)[0] == 0
        return (folder / "model.safetensors").read_bytes()

    assert made() == made("--seed", 0) != made("--seed", 1)


@pytest.mark.spec("CLI-4")
def test_a_type_that_synth_cannot_store_is_refused(tmp_path: Path) -> None:
    assert "invalid choice: 'fp8'" in refused("synth", tmp_path / "m", "--shape", "tiny", "--dtype", "fp8")
    assert list(tmp_path.iterdir()) == []
