"""The command line: what goes where, the JSON contract, one clear line for every bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from refinfer.cli import main
from refinfer.generate import Session, load
from refinfer.process import peak_rss_bytes

GENERATE_KEYS = {
    "text": str,
    "prompt_token_ids": list,
    "token_ids": list,
    "finish_reason": str,
    "time_to_first_token_s": float,
    "tokens_per_s": float,
    "peak_rss_bytes": int,
    "weight_cache": dict,
    "offload": type(None),
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns its status, standard output and standard error."""

    def run_command(*argv: object) -> tuple[int, str, str]:
        status = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def program(*argv: str) -> list[str]:
    return [sys.executable, "-m", "refinfer", *argv]


def generate_into(stdout: IO[str] | int) -> subprocess.CompletedProcess[bytes]:
    """Run a real generation whose standard output goes to `stdout`."""
    return subprocess.run(program("generate", "--max-tokens", "20"), stdout=stdout, stderr=subprocess.PIPE, check=False)


@pytest.mark.spec("CLI-1")
def test_generate_writes_the_text_to_standard_output_and_a_summary_to_standard_error(
    run: Run, storyteller: Session
) -> None:
    status, out, err = run("generate", "JULIET:", "--max-tokens", 30)
    text = "".join(storyteller.generate("JULIET:", max_tokens=30))
    assert (status, out) == (0, f"JULIET:{text}\n")
    assert "30 tokens · first after" in err
    assert "tokens/s" in err
    assert "peak memory" in err


@pytest.mark.spec("CLI-1")
def test_generate_without_a_prompt_has_one_of_its_own(run: Run) -> None:
    status, out, _ = run("generate", "--max-tokens", 5)
    assert status == 0
    assert out.startswith("ROMEO:")


@pytest.mark.spec("CLI-2")
def test_generate_json_is_one_object_with_the_documented_keys(run: Run) -> None:
    status, out, err = run("generate", "ROMEO:", "--max-tokens", 7, "--json")
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert {key: type(value) for key, value in result.items()} == GENERATE_KEYS
    assert list(result) == list(GENERATE_KEYS)
    assert len(result["token_ids"]) == len(result["text"]) == 7
    assert result["time_to_first_token_s"] > 0
    assert result["peak_rss_bytes"] == pytest.approx(peak_rss_bytes(), rel=0.05)  # the kernel counts in batches


@pytest.mark.spec("CLI-2", "GEN-2")
def test_token_ids_and_their_text_are_the_same_prompt(run: Run) -> None:
    _, by_text, _ = run("generate", "ROMEO:", "--max-tokens", 9, "--json")
    ids = ",".join(map(str, json.loads(by_text)["prompt_token_ids"]))
    _, by_ids, _ = run("generate", "--token-ids", ids, "--max-tokens", 9, "--json")
    assert json.loads(by_ids)["text"] == json.loads(by_text)["text"]


@pytest.mark.spec("CLI-2")
def test_sampling_options_reach_the_sampler(run: Run, storyteller: Session) -> None:
    options = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.95", "--seed", "11", "--threads", "1"]
    _, out, _ = run("generate", "KING", "--max-tokens", 25, *options, "--json")
    expected = storyteller.generate("KING", max_tokens=25, temperature=0.9, top_k=20, top_p=0.95, seed=11)
    assert json.loads(out)["text"] == "".join(expected)


@pytest.mark.spec("CLI-2", "PACK-28")
@pytest.mark.parametrize(
    "options", [["--weights", "int8"], ["--weights", "int4", "--weight-cache", "off"]], ids=" ".join
)
def test_weight_formats_are_chosen_on_the_command_line(run: Run, options: list[str]) -> None:
    status, out, _ = run("generate", "ROMEO:", "--max-tokens", 20, *options, "--json")
    with load(weights=options[1], weight_cache="off") as session:
        assert (status, json.loads(out)["text"]) == (0, "".join(session.generate("ROMEO:", max_tokens=20)))


@pytest.mark.spec("CLI-3", "ERR-2")
@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--bud", "40%"],
        ["generate", "--max-tok", "4"],
        ["generate", "--budget", "60%", "--plan", "best"],
        ["generate", "a", "b"],
        ["bench", "everything"],
        ["pack", "--format", "int8"],
        ["cache"],
        [],
    ],
    ids=lambda argv: " ".join(argv) or "no command",
)
def test_what_does_not_exist_is_refused(run: Run, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.spec("CLI-4", "ERR-2")
@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "é"], "no token for the character 'é'"),
        (["generate", "a" * 600], "context of 512 positions"),
        (["generate", "--max-tokens", "0"], "must be at least 1, not 0"),
        (["generate", "--max-tokens", "-3"], "must be at least 1, not -3"),
        (["generate", "--max-tokens", "many"], "'many' is not a whole number"),
        (["generate", "--max-tokens", "100000"], "do not fit"),
        (["generate", "--temperature", "nan"], "temperature must be a number"),
        (["generate", "--temperature", "-1"], "temperature must be a number"),
        (["generate", "--temperature", "warm"], "'warm' is not a number"),
        (["generate", "--top-p", "2"], "top-p must be above 0 and at most 1"),
        (["generate", "--top-k", "0"], "must be at least 1"),
        (["generate", "--seed", "-1"], "must be at least 0"),
        (["generate", "--threads", "0"], "must be at least 1"),
        (["generate", "--weights", "fp8"], "invalid choice: 'fp8'"),
        (["generate", "--weight-cache", ":somewhere"], "neither :memory nor a file"),
        (["generate", "--weight-cache", "/"], "must name a file"),
        (["generate", "--plan", "leading"], "give one"),
        (["generate", "--budget", "lots"], "is not a size"),
        (["generate", "--budget", "1kB"], "the smallest that works"),
        (["generate", "--budget", "60%", "--weight-cache", "off"], "a budget needs a cache file"),
        (["generate", "--budget", "60%", "--prefetch-threads", "-1"], "must be at least 0"),
        (["generate", "--threads", "9" * 30], "threads must be from 1 to 1024"),
        (["generate", "--model", "m" * 300], "cannot be read"),
        (["synth", "m" * 300, "--shape", "tiny"], "cannot be made"),
        (["synth", "x", "--shape", "tiny", "--shard-size", "9" * 400 + "TB"], "less than 2^63"),
        (["generate", "--token-ids", "1,two"], "not a list of token ids"),
        (["generate", "--token-ids", "999"], "token id 999 is not in the vocabulary"),
        (["generate", "--token-ids", "1", "ROMEO"], "not both"),
        (["generate", "--model", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["synth", "x", "--shape", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["synth", "x"], "--shape"),
        (["synth", "x", "--shape", "tiny", "--shard-size", "3 apples"], "not a size such as 300MB"),
        (["synth", "x", "--shape", "tiny", "--shard-size", "0"], "at least one byte"),
        (["synth", "/", "--shape", "tiny"], "is not an empty folder"),
        (["synth", "/dev/null/x", "--shape", "tiny"], "/dev/null/x"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_line_and_status_2(run: Run, argv: list[str], why: str) -> None:
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert why in err


@pytest.mark.spec("CLI-5", "ERR-2")
def test_ctrl_c_ends_with_status_130_and_one_line(tmp_path: Path) -> None:
    assert main(["synth", str(tmp_path / "m"), "--shape", "stories15m"]) == 0
    argv = program("generate", "--model", str(tmp_path / "m"), "--token-ids", "1", "--max-tokens", "255")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # the first piece of text: it is generating now
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"refinfer: interrupted\n"
    assert process.returncode == 130


@pytest.mark.spec("CLI-5")
def test_ctrl_c_while_the_program_starts_is_answered_the_same() -> None:
    """The interrupt comes out of the first import of the command line."""
    code = (
        "import sys, importlib.abc\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from refinfer.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"refinfer: interrupted\n")


@pytest.mark.spec("CLI-4", "CLI-1")
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(tmp_path: Path) -> None:
    main(["synth", str(tmp_path / "m"), "--shape", "tiny"])
    argv = program("generate", "é", "--model", str(tmp_path / "m"), "--max-tokens", "3")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(argv, capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(b"?")


@pytest.mark.spec("CLI-4")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "2>/dev/full"])
def test_closed_and_full_streams_change_no_exit_status(closed: str) -> None:
    command = " ".join(program("generate", "--max-tokens", "{}")) + " " + closed
    statuses = [
        subprocess.run(command.format(n), shell=True, capture_output=True, check=False).returncode for n in (0, 2)
    ]
    assert statuses == ([2, 0] if closed != "2>/dev/full" else [2, 1])


@pytest.mark.spec("TOKEN-3", "CLI-6")
def test_without_the_tokenizers_package_token_ids_still_work(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    main(["synth", str(folder), "--shape", "tiny"])
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"] = ["h e"]
    raw["model"]["vocab"]["he"] = 256
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    blocked = "import sys; sys.modules['tokenizers'] = None; from refinfer.cli import main; sys.exit(main())"

    def run_without(*argv: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-c", blocked, "generate", "--model", str(folder), "--max-tokens", "3", *argv],
            capture_output=True,
            check=False,
        )

    by_ids, by_text = run_without("--token-ids", "1,2"), run_without("hello")
    assert by_ids.returncode == 0
    assert len(by_ids.stdout.split(b",")) == 3
    assert by_text.returncode == 2
    assert b"pip install 'refinfer[hf]', or give the prompt as --token-ids" in by_text.stderr


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
def test_synth_writes_a_checkpoint_that_generate_reads(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    status, out, err = run("synth", folder, "--shape", "tiny", "--dtype", "f16", "--shard-size", "100kB", "--seed", 3)
    assert (status, out) == (0, "")
    assert "tiny, 214,592 parameters, 429 kB in f16" in err
    status, out, _ = run("generate", "hello", "--model", folder, "--max-tokens", 4, "--json")
    assert (status, len(json.loads(out)["token_ids"])) == (0, 4)


@pytest.mark.spec("CLI-6")
def test_without_a_tokenizer_generate_prints_token_ids(run: Run, tmp_path: Path) -> None:
    run("synth", tmp_path / "m", "--shape", "tiny")
    (tmp_path / "m" / "tokenizer.json").unlink()
    status, out, _ = run("generate", "--token-ids", "1,2,3", "--model", tmp_path / "m", "--max-tokens", 4)
    assert status == 0
    assert len([int(i) for i in out.split(",")]) == 4


@pytest.mark.spec("CLI-7", "BENCH-3")
def test_doctor_describes_the_machine(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    machine = json.loads(out)
    assert status == 0
    assert machine["cores"] >= 1
    assert machine["page_bytes"] >= 4096
    assert {"cpu", "memory_bytes", "cgroup", "memlock_limit_bytes", "folder", "blas", "numpy", "python"} <= set(machine)
    assert {"path", "file_system", "direct_io", "read_ahead_kb"} == set(machine["folder"])
    status, out, _ = run("doctor")
    assert status == 0
    assert machine["numpy"] in out


@pytest.mark.spec("CLI-8")
def test_a_reader_that_closes_the_pipe_early_ends_the_program_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        program("generate", "--max-tokens", "20"), stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.spec("CLI-4")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            program("generate", "--max-tokens", "20"), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


@pytest.mark.spec("CLI-7")
def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--version", "refinfer 0."), ("--help", "generate")):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out
