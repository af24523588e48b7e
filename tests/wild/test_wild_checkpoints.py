"""Checkpoints as people have them: what loads as `transformers` loads it, and what is refused as what it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import refinfer
from command_line import run
from refinfer.arrays import Float32Array
from refinfer.errors import ConfigError, InputError, SafetensorsError, TokenizerError, WeightsError
from refinfer.model.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from refinfer.model.folder import open_folder, open_weights
from refinfer.model.safetensors import BITS, DTYPES, SafetensorsFile
from refinfer.prepare import choose_format

GOLDEN = Path(__file__).parents[1] / "golden"
TIED, UNTIED = "qwen2", "llama"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Tensors by name: type, shape, bytes."""


def read(folder: Path) -> Tensors:
    file = SafetensorsFile(folder / SINGLE_NAME)
    return {name: (file[name].dtype, list(file[name].shape), file.view(name).tobytes()) for name in file}


def write(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    begin = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin := begin + len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def noise(dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    return dtype, list(shape), bytes(i % 2 for i in range(int(np.prod(shape)) * BITS[dtype] // 8))


def copied(family: str, folder: Path, **keys: object) -> Path:
    """Copy a golden checkpoint, without its golden values, and change keys of its config."""
    folder.mkdir()
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))
    shutil.copy(GOLDEN / family / SINGLE_NAME, folder)
    return folder


def logits(folder: Path, where: str = ":memory", weights: str = "auto") -> Float32Array:
    with refinfer.load(folder, weight_cache=where, weights=weights, max_positions=32) as session:
        return session.logits([1, 2, 3, 5, 8, 13])


def short(name: str) -> str:
    return name.removeprefix("model.")


FORMS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "names without model., tied": (TIED, lambda t: {short(name): it for name, it in t.items()}),
    "names without model., untied": (UNTIED, lambda t: {short(name): it for name, it in t.items()}),
    "names of the layers without model.": (
        TIED,
        lambda t: {short(name) if "layers" in name else name: it for name, it in t.items()},
    ),
    "names with model. twice": (UNTIED, lambda t: {f"model.{name}": it for name, it in t.items()}),
    "a tied model with only the output table": (
        TIED,
        lambda t: {OUTPUT if name == EMBEDDING else name: it for name, it in t.items()},
    ),
    "another tensor whose name would have to be completed": (TIED, lambda t: t | {"norm.weight": noise("F32", 16)}),
    "Llama 2's frequencies": (
        TIED,
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": noise("F32", 4)},
    ),
    "a layer too many": (TIED, lambda t: t | {"model.layers.77.mlp.up_proj.weight": noise("F64", 2, 3)}),
    **{
        f"another tensor of type {dtype}": (TIED, lambda t, dtype=dtype: t | {"x": noise(dtype, 4, 4)})  # type: ignore[misc]
        for dtype in BITS
    },
}


@pytest.mark.spec("TENSOR-13", "TENSOR-14", "TENSOR-15")
@pytest.mark.parametrize(("family", "change"), FORMS.values(), ids=FORMS)
def test_a_checkpoint_in_another_form_gives_the_same_logits(
    tmp_path: Path, family: str, change: Callable[[Tensors], Tensors]
) -> None:
    folder = copied(family, tmp_path / "model")
    write(folder / SINGLE_NAME, change(read(GOLDEN / family)))
    for where in ("off", ":memory"):
        assert_array_equal(logits(folder, where), logits(GOLDEN / family, where), strict=True)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

INDEXES: dict[str, Callable[[dict[str, str]], Mapping[str, str]]] = {
    "sound": lambda index: index,
    "lists a tensor that no file has": lambda index: index | {"model.layers.0.extra": ONE},
    "omits a tensor": lambda index: {name: shard for name, shard in index.items() if name != EMBEDDING},
    "puts every tensor into the wrong file": lambda index: {
        name: TWO if shard == ONE else ONE for name, shard in index.items()
    },
}


@pytest.mark.spec("TENSOR-10")
@pytest.mark.parametrize("mistake", INDEXES.values(), ids=INDEXES)
def test_mistakes_in_an_index_about_its_files_change_nothing(
    tmp_path: Path, mistake: Callable[[dict[str, str]], Mapping[str, str]]
) -> None:
    folder, tensors = copied(TIED, tmp_path / "model"), read(GOLDEN / TIED)
    (folder / SINGLE_NAME).unlink()
    index = {name: ONE if i % 2 else TWO for i, name in enumerate(tensors)}
    for shard in (ONE, TWO):
        write(folder / shard, {name: tensor for name, tensor in tensors.items() if index[name] == shard})
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": mistake(index)}))
    assert_array_equal(logits(folder), logits(GOLDEN / TIED), strict=True)


@pytest.mark.spec("TENSOR-13")
def test_a_tensor_that_nobody_needs_changes_neither_the_format_nor_the_sources(tmp_path: Path) -> None:
    folder = copied(UNTIED, tmp_path / "model")
    halved = {name: noise("BF16", *shape) for name, (_, shape, _) in read(folder).items()}
    (folder / SINGLE_NAME).unlink()
    write(folder / ONE, halved)
    write(folder / TWO, {"score.weight": noise("F32", 2, 16), "steps": noise("I64", 2, 2)})
    index = dict.fromkeys(halved, ONE) | {"score.weight": TWO, "steps": TWO}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
    checkpoint = open_weights(folder)
    assert choose_format(open_checkpoint(folder), "auto") == "f32"
    assert choose_format(checkpoint, "auto") == "bf16"
    assert checkpoint.paths == (folder / ONE,)


def both_tables(folder: Path, *, tie: bool) -> Path:
    """A model whose tables differ: the output table has the rows of the embedding table in reverse."""
    copied(TIED, folder, tie_word_embeddings=tie)
    tensors = read(folder)
    dtype, shape, data = tensors[EMBEDDING]
    reverse = np.frombuffer(data, np.uint8).reshape(shape[0], -1)[::-1].tobytes()
    write(folder / SINGLE_NAME, tensors | {OUTPUT: (dtype, shape, reverse)})
    return folder


@pytest.mark.spec("TENSOR-15")
@pytest.mark.parametrize("weights", ["f32", "int8"])
@pytest.mark.parametrize("where", ["off", ":memory", "file"])
def test_two_stored_tables_are_used_as_stored_with_one_warning(tmp_path: Path, where: str, weights: str) -> None:
    tied, untied = (both_tables(tmp_path / f"{tie}", tie=tie) for tie in (True, False))
    place = str(tmp_path / "packed") if where == "file" else where
    expected = logits(untied, where if where != "file" else ":memory", weights)
    with pytest.warns(RuntimeWarning, match="the checkpoint has both, and both are used as stored") as warned:
        assert_array_equal(logits(tied, place, weights), expected, strict=True)
    assert len(warned) == 1
    if weights == "f32":  # the last table decides which logit is whose
        assert_allclose(expected[:, ::-1], logits(GOLDEN / TIED, "off"), rtol=0, atol=1e-5)


@pytest.mark.spec("TENSOR-15")
def test_two_stored_tables_count_wherever_the_model_is_looked_at(tmp_path: Path) -> None:
    tied, untied = (both_tables(tmp_path / f"{tie}", tie=tie) for tie in (True, False))
    rows = []
    for folder in (tied, untied):
        assert not open_folder(folder).config.tie_word_embeddings
        assert OUTPUT in open_weights(folder)
        status, out, err = run("plan", "--model", folder, "--weights", "f32", "--json")
        assert (status, err.count("warning: ")) == (0, int(folder == tied))
        rows.append(json.loads(out)["streamable_bytes"])
        status, out, err = run("pack", folder, "--json")
        assert (status, err.count("warning: ")) == (0, int(folder == tied))
        rows.append(json.loads(out)["packed_bytes"])
        status, out, err = run("generate", "--model", folder, "--token-ids", "1,2", "--max-tokens", "4", "--json")
        assert (status, err.count("warning: ")) == (0, int(folder == tied))
        rows.append(json.loads(out)["token_ids"])
    assert rows[:3] == rows[3:]


@pytest.mark.spec("TENSOR-15", "TENSOR-11")
def test_an_untied_model_without_its_output_table_is_refused(tmp_path: Path) -> None:
    folder = copied(TIED, tmp_path / "model", tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"has no tensor 'lm_head\.weight'"):
        logits(folder)


Q_PROJ = "model.layers.0.self_attn.q_proj"

NEEDED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "fp8": (
        lambda t: t | {f"{Q_PROJ}.weight": noise("F8_E4M3", *t[f"{Q_PROJ}.weight"][1])},
        "is stored as F8_E4M3; supported are F32, F16, BF16: the weights are quantised to fp8",
    ),
    "float64": (
        lambda t: t | {f"{Q_PROJ}.weight": noise("F64", *t[f"{Q_PROJ}.weight"][1])},
        "is stored as F64; supported are F32, F16, BF16",
    ),
    "GPTQ": (
        lambda t: (
            {k: v for k, v in t.items() if k != f"{Q_PROJ}.weight"}
            | {f"{Q_PROJ}.qweight": noise("I32", 4, 4), f"{Q_PROJ}.g_idx": noise("I32", 4)}
        ),
        f"has no tensor '{Q_PROJ}.weight', but '{Q_PROJ}.qweight': the weights are quantised with GPTQ",
    ),
    "GPTQ in all layers": (
        lambda t: (
            {re.sub(r"_proj\.weight", "_proj.qweight", k): v for k, v in t.items()}
            | {f"{Q_PROJ}.g_idx": noise("I32", 4)}
        ),
        "the weights are quantised with GPTQ; give the model's unquantised checkpoint instead",
    ),
    "AWQ": (
        lambda t: {re.sub(r"_proj\.weight", "_proj.qweight", k): v for k, v in t.items()},
        "the weights are quantised with AWQ; give the model's unquantised checkpoint instead",
    ),
    "bitsandbytes": (
        lambda t: t | {f"{Q_PROJ}.weight": noise("U8", 128, 1)},
        "is stored as U8; supported are F32, F16, BF16: the weights are quantised to 8-bit integers",
    ),
    "doubles": (
        lambda t: t | {f"{Q_PROJ}.weight": noise("F64", *t[f"{Q_PROJ}.weight"][1])},
        "is stored as F64; supported are F32, F16, BF16",
    ),
    "integers": (
        lambda t: t | {f"{Q_PROJ}.weight": noise("I64", *t[f"{Q_PROJ}.weight"][1])},
        "is stored as I64; supported are F32, F16, BF16",
    ),
}


@pytest.mark.spec("TENSOR-11")
@pytest.mark.parametrize(("change", "why"), NEEDED.values(), ids=NEEDED)
def test_a_needed_weight_of_another_kind_is_refused_as_what_it_is(
    tmp_path: Path, change: Callable[[Tensors], Tensors], why: str
) -> None:
    folder = copied(TIED, tmp_path / "model")
    write(folder / SINGLE_NAME, change(read(folder)))
    for where in ("off", ":memory"):
        with pytest.raises(WeightsError, match=re.escape(why)) as refused:
            logits(folder, where)
        assert ("quantised" in str(refused.value)) == ("quantised" in why)


@pytest.mark.spec("CONFIG-6", "TENSOR-11")
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_a_config_that_calls_its_weights_quantised_is_refused_with_the_method(tmp_path: Path, method: str) -> None:
    folder = copied(TIED, tmp_path / "model", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=f"quantization_config is set: the weights are quantised with '{method}'"):
        logits(folder)


@pytest.mark.spec("TENSOR-3")
@pytest.mark.parametrize("dtype", sorted(set(BITS) - set(DTYPES)))
def test_a_type_that_numpy_cannot_hold_is_found_but_not_viewed(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "file", {"x": noise(dtype, 4, 4)})
    file = SafetensorsFile(tmp_path / "file")
    assert file["x"].nbytes == 16 * BITS[dtype] // 8
    with pytest.raises(SafetensorsError, match=f"'x' is {dtype}, which numpy cannot hold"):
        file.view("x")


@pytest.mark.spec("TENSOR-3")
@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_tensor_that_ends_within_a_byte_is_refused(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "file", {"x": (dtype, [3], bytes(3 * BITS[dtype] // 8))})
    with pytest.raises(SafetensorsError, match="does not end with a whole byte"):
        SafetensorsFile(tmp_path / "file")


OTHER_FORMS = {
    "pickled weights": (["config.json", "pytorch_model.bin"], "pickled PyTorch weights (pytorch_model.bin)", ""),
    "pickled shards": (
        ["config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
        "pickled PyTorch weights (pytorch_model-00001-of-00002.bin)",
        "",
    ),
    "GGUF": (["config.json", "model-q4_0.gguf"], "GGUF, the form of llama.cpp (model-q4_0.gguf)", "model-q4_0.gguf"),
    "GGUF alone": (["a.gguf", "b.gguf"], "GGUF, the form of llama.cpp (a.gguf)", "a.gguf"),
}


@pytest.mark.spec("HUB-4")
@pytest.mark.parametrize("name", ["model", "it's a model"])
@pytest.mark.parametrize(("names", "what", "gguf"), OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_a_folder_in_the_form_of_another_program_is_named_with_its_conversion(
    tmp_path: Path, names: list[str], what: str, gguf: str, name: str
) -> None:
    folder = copied(TIED, tmp_path / name)
    config = (folder / "config.json").read_bytes()
    for file in (SINGLE_NAME, "config.json"):
        (folder / file).unlink()
    for file in names:
        (folder / file).write_bytes(config if file == "config.json" else b"x")
    status, _, err = run("generate", "--model", folder, "--token-ids", "1")
    assert (status, err.count("\n")) == (2, 1)
    assert what in err
    command, _, needs = err.partition("convert it with ")[2].partition(" (needs ")
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    assert command.startswith('python -c "') == (name == "model")  # quotes that any system takes, if they are enough
    options = f", gguf_file={gguf!r}" if gguf else ""
    assert f"from_pretrained({str(folder)!r}{options}).save_pretrained({str(folder)!r})" in code
    assert ("gguf" in needs) == bool(gguf)
    compile(code, "the command", "exec")


@pytest.mark.spec("HUB-4")
def test_a_gguf_file_in_place_of_a_folder_is_named_with_its_conversion(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"m\.gguf is GGUF, the form of llama\.cpp; convert it with python -c "):
        open_folder(tmp_path / "m.gguf")


@pytest.mark.spec("HUB-4")
def test_only_a_file_of_that_name_is_called_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    for name in ("m.safetensors", "nowhere.gguf"):
        with pytest.raises(ConfigError, match=f"{name} is not a folder; --model takes a folder with config.json"):
            open_folder(tmp_path / name)


@pytest.mark.spec("HUB-4")
def test_a_folder_with_safetensors_may_hold_the_other_forms_as_well(tmp_path: Path) -> None:
    folder = copied(TIED, tmp_path / "model")
    for name in ("pytorch_model.bin", "model.gguf"):
        (folder / name).write_bytes(b"x")
    assert_array_equal(logits(folder), logits(GOLDEN / TIED), strict=True)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064x}\nsize 28752\n"


@pytest.mark.spec("TENSOR-16")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        (SINGLE_NAME, SafetensorsError),
        (INDEX_NAME, SafetensorsError),
        (ONE, SafetensorsError),
        ("config.json", ConfigError),
        ("tokenizer.json", TokenizerError),
    ],
)
def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, name: str, error: type[InputError]) -> None:
    folder = copied(TIED, tmp_path / "model")
    if name in (INDEX_NAME, ONE):
        (folder / SINGLE_NAME).rename(folder / TWO)
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": ONE, "y": TWO}}))
    (folder / name).write_text(POINTER)
    with pytest.raises(error, match=rf"{name} cannot be read: it is a Git LFS pointer.* with git lfs pull"):
        logits(folder)
