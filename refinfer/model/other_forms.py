"""What to do about a model that is there, but not in Hugging Face's form with safetensors, or only in part.

Recognises files of other programs by their names and gives the command that converts them. Leaves to others: reading
models.
Read more: tutorial 00; clause HUB-4.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from refinfer.model.hub import download_command, repository_of

__all__ = ["what_to_do", "why_not_a_folder"]

_A_MODEL_FOLDER: Final = "a model folder holds config.json and safetensors files"
_NAMED: Final = {"GGUF, the form of llama.cpp": "*.gguf", "pickled PyTorch weights": "pytorch_model*.bin"}


def why_not_a_folder(path: Path) -> str:
    """Return why something cannot be a model folder, and what to do."""
    if path.suffix == ".gguf" and path.is_file():
        return f"{path} is GGUF, the form of llama.cpp; {_convert(path.parent, path.name)}"
    return f"{path} is not a folder; --model takes a folder with config.json and safetensors files"


def what_to_do(folder: Path, otherwise: str = _A_MODEL_FOLDER) -> str:
    """Return what to do about a folder that lacks a file; `otherwise` if nothing is known of the folder."""
    for form, pattern in _NAMED.items():
        if found := sorted(folder.glob(pattern)):
            return f"it has {form} ({found[0].name}); {_convert(folder, found[0].name)}"
    if repository := repository_of(folder.resolve()):
        return f"the download is not complete; complete it with {download_command(repository)}"
    return otherwise


def _convert(folder: Path, name: str) -> str:
    """Return the command that writes the safetensors files next to the file `name`."""
    gguf = f", gguf_file={name!r}" if name.endswith(".gguf") else ""
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[C.from_pretrained({str(folder)!r}{gguf}).save_pretrained({str(folder)!r}) for C in (M, T)]"
    )
    quoted = shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'  # easier to read, if it is enough
    needs = "transformers, torch and gguf" if gguf else "transformers and torch"
    return f"convert it with python -c {quoted} (needs {needs})"
