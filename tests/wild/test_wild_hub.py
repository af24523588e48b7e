"""Models that were downloaded from the Hugging Face Hub, found by their names; the network is never used."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import refinfer
from command_line import run
from refinfer.errors import ConfigError, InputError
from refinfer.model.folder import open_folder
from refinfer.model.hub import called, find_model, hub_cache, repository_of

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2"
REVISION = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable is set; the home folder is `home`, and the current folder is empty."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return monkeypatch


@pytest.fixture
def hub(tmp_path: Path, environment: pytest.MonkeyPatch) -> Path:
    """The folder of an empty Hugging Face cache, which the environment names."""
    environment.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def download(hub: Path, name: str = "org/name", revision: str = REVISION) -> Path:
    """Put a model into a Hugging Face cache, as `hf download` does: a snapshot of links into blobs."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    for file in (GOLDEN / "config.json", GOLDEN / "model.safetensors"):
        shutil.copy(file, repository / "blobs" / f"{file.name}-digest")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-digest")
    return snapshot


PLACES = {
    "the newest variable": ({name: f"/{name}" for name in NAMES}, "/HF_HUB_CACHE"),
    "its older name": ({name: f"/{name}" for name in NAMES[1:]}, "/HUGGINGFACE_HUB_CACHE"),
    "the home of Hugging Face": ({name: f"/{name}" for name in NAMES[2:]}, "/HF_HOME/hub"),
    "the user's caches": ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    "nothing is set": ({}, "~/.cache/huggingface/hub"),
    "a variable is empty": ({"HF_HUB_CACHE": "", "HF_HOME": "/h"}, "/h/hub"),
    "a tilde": ({"HF_HOME": "~/h"}, "~/h/hub"),
    "a variable in a variable": ({"HF_HUB_CACHE": "$HOME/h"}, "~/h"),
}


@pytest.mark.spec("HUB-1")
@pytest.mark.parametrize(("variables", "place"), PLACES.values(), ids=PLACES)
def test_the_cache_lies_where_hugging_face_puts_it(
    environment: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert hub_cache() == Path(place).expanduser()


@pytest.mark.spec("HUB-1")
@pytest.mark.parametrize("name", ["org/name", "o/N_a.m-e", "gpt2"])
def test_a_name_leads_to_the_revision_that_was_downloaded_last(hub: Path, name: str) -> None:
    older = download(hub, name, "older")
    assert find_model(name) == older
    newer = download(hub, name)
    assert find_model(name) == newer
    assert open_folder(name).path == newer
    assert called(newer) == repository_of(newer) == name


@pytest.mark.spec("HUB-1")
def test_an_existing_folder_goes_first(hub: Path) -> None:
    download(hub)
    Path("org/name").mkdir(parents=True)
    assert find_model("org/name") == Path("org/name")


@pytest.mark.spec("HUB-1")
@pytest.mark.parametrize(
    "name", ["", ".", "/", "..", "./org/name", "org/name/", "a/b/c", "org--name", "a..b/c", "-x/y", "~/x", "x" * 97]
)
def test_what_is_no_name_of_a_repository_is_a_folder(hub: Path, name: str) -> None:
    download(hub)
    assert find_model(name) == Path(name)


@pytest.mark.spec("HUB-1")
@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_a_name_that_the_cache_lacks_is_a_path_if_it_can_only_be_one(hub: Path, name: str) -> None:
    Path("org").mkdir()
    Path("org/name").touch()
    assert find_model(name) == Path(name)
    with pytest.raises(ConfigError, match=f"^{name} is not a folder"):
        open_folder(name)


@pytest.mark.spec("HUB-1")
@pytest.mark.parametrize("reference", ["../../..", "/", "", ".", "a/b", "\0", "x" * 2000, "nowhere"], ids=ascii)
def test_a_reference_never_leads_out_of_its_folder(hub: Path, reference: str) -> None:
    download(hub)
    (hub / "models--org--name" / "refs" / "main").write_text(reference)
    with pytest.raises(ConfigError, match="has only a part of org/name: refs/main leads to no snapshot; complete it"):
        find_model("org/name")


@pytest.mark.spec("HUB-1", "HUB-3")
def test_every_command_takes_a_name(hub: Path) -> None:
    snapshot = download(hub)
    status, out, _ = run("generate", "--model", "org/name", "--token-ids", "1,2", "--max-tokens", "3", "--json")
    expected = run("generate", "--model", GOLDEN, "--token-ids", "1,2", "--max-tokens", "3", "--json")[1]
    assert status == 0
    assert json.loads(out)["token_ids"] == json.loads(expected)["token_ids"]
    run("cache", "rm", "--all")
    assert run("pack", "org/name")[0] == 0
    for command in ("plan", "simulate"):
        status, out, _ = run(command, "--model", "org/name", "--json")
        assert (status, json.loads(out)["model"]) == (0, "org/name")
    (packed,) = json.loads(run("cache", "path", "org/name", "--json")[1])
    assert Path(packed).name.startswith("org-name-bf16-")
    for command in ("info", "verify"):
        (row,) = json.loads(run("cache", command, "org/name", "--json")[1])
        assert row["path"] == packed
    listed = json.loads(run("cache", "list", "org/name", "--json")[1])
    assert [(row["repository"], row["model"]) for row in listed["files"]] == [("org/name", str(snapshot))]
    assert run("cache", "rm", "org/name")[0] == 0
    assert not Path(packed).exists()
    with refinfer.load("org/name", weight_cache=":memory", max_positions=8) as session:
        assert session.model.path == snapshot


@pytest.mark.spec("HUB-3")
def test_people_see_the_name_and_not_the_revision(hub: Path) -> None:
    download(hub)
    run("pack", "org/name")
    status, out, _ = run("cache", "list")
    assert (status, REVISION in out) == (0, False)
    assert re.search(r"org-name-bf16-\w+\.packed.*\borg/name\b", out, re.DOTALL)
    assert re.search(r"name on the Hugging Face Hub\W+org/name\b", run("cache", "info", "org/name")[1])


@pytest.mark.spec("HUB-3")
def test_a_model_elsewhere_has_no_name_on_the_hub(hub: Path, tmp_path: Path) -> None:
    run("pack", shutil.copytree(GOLDEN, tmp_path / "my model"))
    (row,) = json.loads(run("cache", "list", "--json")[1])["files"]
    assert row["repository"] is None
    assert Path(row["path"]).name.startswith("my-model-bf16-")
    assert hub.exists()


@pytest.mark.spec("HUB-3", "IDENT-1")
def test_a_blob_that_changes_is_noticed(hub: Path) -> None:
    download(hub)
    assert json.loads(run("pack", "org/name", "--json")[1])["state"] == "built"
    assert json.loads(run("pack", "org/name", "--json")[1])["state"] == "loaded"
    blob = hub / "models--org--name" / "blobs" / "model.safetensors-digest"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert json.loads(run("pack", "org/name", "--json")[1])["state"] == "built"


@pytest.mark.spec("HUB-3")
@pytest.mark.parametrize(("mode", "packed_mode"), [(0o600, 0), (0o644, 0o044)], ids=["private", "public"])
def test_a_packed_file_is_no_more_readable_than_the_blob(hub: Path, mode: int, packed_mode: int) -> None:
    download(hub)
    (hub / "models--org--name" / "blobs" / "model.safetensors-digest").chmod(mode)
    packed = Path(run("pack", "org/name")[1].strip())
    assert stat.S_IMODE(packed.stat().st_mode) & 0o077 == packed_mode


@pytest.mark.spec("HUB-2")
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--model", "org/name"),
        ("pack", "org/name"),
        ("plan", "--model", "org/name"),
        ("cache", "path", "org/name"),
        ("cache", "info", "org/name"),
    ],
    ids=" ".join,
)
def test_a_missing_model_is_refused_with_the_command_that_downloads_it(hub: Path, command: tuple[str, ...]) -> None:
    status, out, err = run(*command)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"org/name is neither a folder nor a model in the Hugging Face cache {hub}" in err
    assert "download it with hf download org/name" in err


def dangling(snapshot: Path) -> None:
    for blob in (snapshot.parents[1] / "blobs").iterdir():
        blob.rename(f"{blob}.incomplete")


def without_a_shard(snapshot: Path) -> None:
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    weight_map = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


PARTS: dict[str, Callable[[Path], object]] = {
    "no snapshot": shutil.rmtree,
    "another revision only": lambda snapshot: (snapshot.parents[1] / "refs" / "main").unlink(),
    "no config": lambda snapshot: (snapshot / "config.json").unlink(),
    "no weights": lambda snapshot: (snapshot / "model.safetensors").unlink(),
    "links to nothing": dangling,
    "a shard is missing": without_a_shard,
}


@pytest.mark.spec("HUB-2")
@pytest.mark.parametrize("lose", PARTS.values(), ids=PARTS)
def test_half_a_model_is_refused_with_the_command_that_completes_it(hub: Path, lose: Callable[[Path], object]) -> None:
    snapshot = download(hub)
    lose(snapshot)
    status, out, err = run("generate", "--model", "org/name", "--token-ids", "1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "complete it with hf download org/name" in err


@pytest.mark.spec("HUB-2")
def test_a_plan_needs_no_more_of_a_model_than_its_config(hub: Path) -> None:
    (download(hub) / "model.safetensors").unlink()
    assert run("plan", "--model", "org/name", "--weights", "int8")[0] == 0


@pytest.mark.spec("HUB-2")
def test_a_cache_that_cannot_be_read_is_a_named_error(hub: Path) -> None:
    (hub / "models--org--name").touch()
    with pytest.raises(InputError, match="hf download org/name"):
        find_model("org/name")


@pytest.mark.spec("HUB-2")
def test_no_module_can_use_the_network() -> None:
    package = Path(refinfer.__file__).parent
    able = r"\b(?:import|from) +(?:socket|ssl|http|urllib|ftplib|asyncio|requests|httpx|huggingface_hub)\b"
    assert not [path for path in package.rglob("*.py") if re.search(able, path.read_text())]
