"""The command `generate`: what goes where, and the JSON contract."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refinfer.cli.main import main
from refinfer.generate import STORYTELLER, Session, load
from refinfer.model.folder import DEFAULT_MAX_TOKENS
from refinfer.process import peak_rss_bytes

sys.path.insert(0, str(Path(__file__).parent))
from command_line import json_of, refused, run

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
    "sampling": dict,
}


@pytest.mark.spec("CLI-1")
def test_generate_writes_the_text_to_standard_output_and_a_summary_to_standard_error(storyteller: Session) -> None:
    status, out, err = run("generate", "JULIET:", "--max-tokens", 30, "--temperature", 0)
    text = "".join(storyteller.generate("JULIET:", max_tokens=30))
    assert (status, out) == (0, f"JULIET:{text}\n")
    assert "30 tokens · first after" in err
    assert "tokens/s" in err
    assert "peak memory" in err


@pytest.mark.spec("CLI-1", "CAL-4", "CAL-7", "CAL-8", "CAL-9")
def test_generate_within_a_budget_shows_where_the_budget_went_what_was_read_and_how_fast_that_could_be() -> None:
    status, _, err = run("generate", "--max-tokens", 3, "--budget", "70%")
    assert status == 0
    budget, plan, rates = err.splitlines()[-3:]
    assert re.fullmatch(r"budget: [\d.]+ MB, peak [\d.]+ MB: locked .* [\d.]+ [kM]B", budget)
    assert re.fullmatch(
        r"plan optimal: [\d.]+ [kM]B streamed per token, [\d.]+ [kM]B read in total; waited .*s for it, computed .*s",
        plan,
    )
    number = r"[\d.,]+"
    likely = rf"tokens/s: {number} if the disk( is| and the processor are) as assumed \(run refinfer bench calibrate\)"
    assert re.fullmatch(rf"{likely}, measured {number}, ideal {number}", rates)
    one_token = run("generate", "--max-tokens", 1, "--budget", "70%")[2].splitlines()[-1]
    assert re.fullmatch(likely, one_token)
    nine_tokens = run("generate", "--max-tokens", 9, "--budget", "70%")[2].splitlines()[-1]
    assert re.fullmatch(rf"{likely}, after 8 tokens {number}, measured {number}, ideal {number}", nine_tokens)


@pytest.mark.spec("CLI-2")
@pytest.mark.parametrize("plan", [None, "leading"])
def test_a_plan_is_chosen_on_the_command_line_or_is_the_best_one(plan: str | None) -> None:
    options = ["--plan", plan] if plan else []
    status, out, _ = run("generate", "a", "--max-tokens", 1, "--budget", "60%", "--json", *options)
    assert (status, json.loads(out)["offload"]["plan"]) == (0, plan or "optimal")


@pytest.mark.spec("PLAN-20")
def test_generate_within_a_budget_reserves_the_positions_that_plan_reserves_or_those_that_the_request_needs() -> None:
    def reserved(*request: object) -> int:
        nbytes: int = json_of("generate", "--budget", "70%", *request)["offload"]["kv_cache_bytes"]
        return nbytes

    planned = json_of("plan", "--model", STORYTELLER, "--budget", "70%")
    nbytes, positions = planned["plans"][0]["kv_cache_bytes"], planned["positions"]
    assert reserved("ROMEO:") == nbytes
    assert reserved("a" * 100) == nbytes * (100 + DEFAULT_MAX_TOKENS) // positions > nbytes
    assert reserved("ROMEO:", "--max-tokens", 4) == nbytes * 10 // positions


@pytest.mark.spec("STORE-5")
def test_a_run_with_a_disk_bandwidth_reads_no_faster() -> None:
    options = ["a", "--max-tokens", 2, "--budget", "50%", "--disk-bandwidth", "20MB/s"]
    begun = time.monotonic()
    read = json_of("generate", *options)["offload"]["read_bytes_total"]
    assert time.monotonic() - begun > 0.9 * read / 20e6
    assert "argument --disk-bandwidth: 'fast' is not a" in refused("generate", *options[:-1], "fast")


@pytest.mark.spec("GEN-13")
def test_a_cache_file_that_cannot_be_written_is_one_line_of_the_programs_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    status, out, err = run("generate", "a", "--max-tokens", 2, "--weight-cache", place, "-q")
    assert (status, out[:1], err.count("\n")) == (0, "a", 1)
    assert err.startswith(f"refinfer: warning: {place} cannot be written: ")


@pytest.mark.spec("CLI-5")
def test_an_interrupt_ends_the_text_without_a_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["generate", "a", "--weight-cache", ":memory"])
    assert capsys.readouterr() == ("aa", "")


@pytest.mark.spec("CLI-1")
def test_generate_without_a_prompt_has_one_of_its_own() -> None:
    status, out, _ = run("generate", "--max-tokens", 5)
    assert status == 0
    assert out.startswith("ROMEO:")


@pytest.mark.spec("CLI-2")
def test_generate_json_is_one_object_with_the_documented_keys() -> None:
    status, out, err = run("generate", "ROMEO:", "--max-tokens", 7, "--json")
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert {key: type(value) for key, value in result.items()} == GENERATE_KEYS
    assert list(result) == list(GENERATE_KEYS)
    assert len(result["token_ids"]) == len(result["text"]) == 7
    assert result["time_to_first_token_s"] > 0
    assert result["peak_rss_bytes"] == pytest.approx(peak_rss_bytes(), rel=0.05)  # the kernel counts in batches


@pytest.mark.spec("CLI-2", "GEN-2")
def test_token_ids_and_their_text_are_the_same_prompt() -> None:
    _, by_text, _ = run("generate", "ROMEO:", "--max-tokens", 9, "--seed", 5, "--json")
    ids = ",".join(map(str, json.loads(by_text)["prompt_token_ids"]))
    _, by_ids, _ = run("generate", "--token-ids", ids, "--max-tokens", 9, "--seed", 5, "--json")
    assert json.loads(by_ids)["text"] == json.loads(by_text)["text"]


@pytest.mark.spec("CLI-2")
def test_sampling_options_reach_the_sampler(storyteller: Session) -> None:
    options = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.95", "--seed", "11", "--threads", "1"]
    _, out, _ = run("generate", "KING", "--max-tokens", 25, *options, "--json")
    expected = storyteller.generate("KING", max_tokens=25, temperature=0.9, top_k=20, top_p=0.95, seed=11)
    assert json.loads(out)["text"] == "".join(expected)
    assert json.loads(out)["sampling"] == {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11}


@pytest.mark.spec("CLI-2", "PACK-28")
@pytest.mark.parametrize(
    "options", [["--weights", "int8"], ["--weights", "int4", "--weight-cache", "off"]], ids=" ".join
)
def test_weight_formats_are_chosen_on_the_command_line(options: list[str]) -> None:
    status, out, _ = run("generate", "ROMEO:", "--max-tokens", 20, "--temperature", 0, *options, "--json")
    with load(weights=options[1], weight_cache="off") as session:
        assert (status, json.loads(out)["text"]) == (0, "".join(session.generate("ROMEO:", max_tokens=20)))


@pytest.mark.spec("TOKEN-3", "CLI-6")
def test_without_the_tokenizers_package_token_ids_still_work(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    main(["synth", str(folder), "--shape", "tiny"])
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"] = ["h e"]
    raw["model"]["vocab"]["he"] = 256
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    blocked = "import sys; sys.modules['tokenizers'] = None; from refinfer.cli.main import main; sys.exit(main())"

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


@pytest.mark.spec("CLI-6")
def test_without_a_tokenizer_generate_prints_token_ids(tmp_path: Path) -> None:
    run("synth", tmp_path / "m", "--shape", "tiny")
    (tmp_path / "m" / "tokenizer.json").unlink()
    status, out, _ = run("generate", "--token-ids", "1,2,3", "--model", tmp_path / "m", "--max-tokens", 4)
    assert status == 0
    assert len([int(i) for i in out.split(",")]) == 4
