"""Make the golden files of chats with `transformers`.

    pip install transformers==5.24.0 tokenizers jinja2
    python tests/golden/make_chat_goldens.py

Writes, in `chat/`, one folder for each manner of chat: a tiny byte-level tokenizer, a config in the spelling of such
checkpoints, a template in their manner, and `golden.json`: for each case the prompt and the system's text, and what
`apply_chat_template` made of them, as text and as ids. The date in the Llama template is that of `NOW`.
"""

# ruff: noqa: E501  (templates have long lines)

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path
from typing import Any

import transformers.utils.chat_template_utils as rendering
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "chat"
NOW = dt.datetime(2025, 3, 9, 12, 30)  # noqa: DTZ001  (a local time, as the template sees one)

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system's message comes first, so that it can be put into its slot. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] not in ["user", "assistant"] %}
        {%- continue %}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {% generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

MANNERS: dict[str, dict[str, Any]] = {
    "llama3": {
        "template": LLAMA3,
        "tokens": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "begins_with": "<|begin_of_text|>",
        "where": "file",
    },
    "qwen2.5": {
        "template": QWEN25,
        "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "config": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "where": "config",
        "only_config": 2,
    },
    "qwen3": {
        "template": QWEN3,
        "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        "config": {"bos_token": None, "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
        "where": "config",
        "only_config": 4,
        "plain": ["<think>", "</think>"],
    },
    "mistral": {
        "template": MISTRAL,
        "tokens": ["<s>", "</s>", "[INST]", "[/INST]"],
        "config": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "begins_with": "<s>",
        "where": "list",
    },
}
CASES = {
    "a question": ("What is the capital of France?", None),
    "a system": ("What is the capital of France?", "Answer in one word."),
    "spaces and lines": ("  two\n\n\tlines  ", " terse \n"),
    "braces": ("{{ 7 * 7 }} {% raw %} <b>&amp;</b> \"'", "{# no comment #}"),
    "other scripts": ("水は何ですか 👨‍👩‍👧", "नमस्ते"),
    "tokens of the template": ("<|im_end|><|eot_id|></s><think> [/INST]", None),
}


class Frozen(dt.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
        return NOW


def write_tokenizer(folder: Path, manner: dict[str, Any]) -> None:
    """Write the three files of a checkpoint's tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    plain, tokens = manner.get("plain", []), manner["tokens"]
    added = [AddedToken(token, special=token not in plain, normalized=False) for token in tokens]
    in_file = added[: len(added) - manner.get("only_config", 0)]
    inner.add_tokens(in_file)
    if first := manner.get("begins_with"):
        pair = (first, inner.token_to_id(first))
        inner.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[pair])
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    config = manner["config"] | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["added_tokens_decoder"] = {
        str(len(letters) + i): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for i, token in enumerate(added)
    }
    if manner["where"] == "config":
        config["chat_template"] = manner["template"]
    elif manner["where"] == "list":
        config["chat_template"] = [
            {"name": "tool_use", "template": "not this one"},
            {"name": "default", "template": manner["template"]},
        ]
    else:
        config["chat_template"] = "not this one either"
        (folder / "chat_template.jinja").write_text(manner["template"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Write all folders."""
    rendering.datetime = Frozen
    for name, manner in MANNERS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_tokenizer(folder, manner)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        golden = {}
        for case, (prompt, system) in CASES.items():
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            golden[case] = {
                "prompt": prompt,
                "system": system,
                "text": text,
                "ids": ids,
                "decoded": tokenizer.decode(ids, skip_special_tokens=True),
            }
        golden["without a template"] = {
            "prompt": "a<think>b<|im_end|></s>",
            "ids": tokenizer("a<think>b<|im_end|></s>")["input_ids"],
        }
        (folder / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        print(name, len(golden), "cases")


if __name__ == "__main__":
    main()
