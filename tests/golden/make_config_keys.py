"""Lists every key that `transformers` reads from a `config.json` of the four families.

Run with `transformers` 5 installed:  python tests/golden/make_config_keys.py

Three kinds of keys are found. Fields of the config class. Keys that the base class takes out of the file under an older
name or for generation. Attributes that the model's code asks a config for if it has them: such a key has no field, and
changes the numbers all the same.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import transformers
from transformers import AutoConfig, GenerationConfig, cache_utils, masking_utils, modeling_rope_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TAKEN = re.compile(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"|\"(\w+)\" in kwargs")
ASKED = re.compile(r"(?:getattr|hasattr)\(\s*(?:self\.|decoder_)?config,\s*\"(\w+)\"|\bconfig\.([a-z]\w*)(?!\w*\()")
MEMBERS = {name for name, _ in inspect.getmembers(PreTrainedConfig) if not name.startswith("__")}


def found(pattern: re.Pattern[str], *places: object) -> set[str]:
    """Return the names that a pattern finds in the source of some objects."""
    return {a or b for place in places for a, b in pattern.findall(inspect.getsource(place))}


taken = found(TAKEN, PreTrainedConfig.__post_init__, RotaryEmbeddingConfigMixin.convert_rope_params_to_dict)
taken |= {"name_or_path", "_commit_hash", "quantization_config", "model_type", "torch_dtype"}
rope = {"original_max_position_embeddings"}  # asked of `self` there
common = found(ASKED, cache_utils, masking_utils, modeling_rope_utils)
keys = {}
for family in FAMILIES:
    config = type(AutoConfig.for_model(family))
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = {field.name for field in fields(config)}
    asked = {name for name in common | found(ASKED, modeling) if name not in MEMBERS or name in own}
    keys[family] = sorted((own | taken | rope | asked) - {"json"})

generation = sorted(GenerationConfig._get_default_generation_params())
found_keys = {"transformers": transformers.__version__, "generation": generation, **keys}
Path(__file__).with_name("config_keys.json").write_text(json.dumps(found_keys, indent=1) + "\n")
