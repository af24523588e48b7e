"""Specifies `refinfer.model.chat`: what a chat template sees, and what it cannot do."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jinja2
import pytest

import refinfer
from refinfer.errors import ChatTemplateError, InputError
from refinfer.model.chat import render_chat


def render(template: str, prompt: str = "hello", system: str | None = None) -> str:
    return render_chat(template, {"bos_token": "<s>"}, prompt, system, lambda form: f"[{form}]")


SEEN = {
    "the messages": (
        "{% for m in messages %}{{ m.role }}: {{ m['content'] }}|{% endfor %}",
        "system: be brief|user: hello|",
    ),
    "a special token": ("{{ bos_token }}", "<s>"),
    "a special token the model lacks": ("[{{ eos_token }}]", "[]"),
    "that an answer is asked for": ("{% if add_generation_prompt %}answer{% endif %}", "answer"),
    "no tools": ("{{ tools is none }} {{ documents is none }}", "True True"),
    "that thinking is up to it": ("{{ enable_thinking is defined }}", "False"),
    "the time": ("{{ strftime_now('%d %b %Y') }}", "[%d %b %Y]"),
    "blocks that leave no trace": ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
    "a last line": ("a\n", "a"),
    "loop controls": (
        "{% for n in range(9) %}{% if n == 1 %}{% continue %}{% elif n > 2 %}{% break %}{% endif %}{{ n }}{% endfor %}",
        "02",
    ),
    "JSON as it is": ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
    "indented JSON": ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    "marks of training": ("{% generation %}a{% endgeneration %}b", "ab"),
    "text that is not escaped": ("{{ '<b>' }}", "<b>"),
    "a namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "2",
    ),
    "filters of Jinja": (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(',') | upper }}",
        "HELLO",
    ),
    "numbers": ("{{ 3 * 4 }} {{ 2 ** 10 }} {{ 'ab' * 2 }} {{ 'x'.rjust(3) }}", "12 1024 abab   x"),
}


@pytest.mark.spec("CHAT-2", "CHAT-3")
@pytest.mark.parametrize(("template", "text"), SEEN.values(), ids=SEEN)
def test_a_template_sees(template: str, text: str) -> None:
    assert render(template, system="be brief") == text


@pytest.mark.spec("CHAT-1")
def test_what_people_say_is_no_template() -> None:
    assert render("{{ messages[0].content }}", "{{ 7 * 7 }}{% endif %}") == "{{ 7 * 7 }}{% endif %}"


@pytest.mark.spec("CHAT-1")
def test_without_a_system_there_is_the_user_alone_and_an_empty_system_is_one() -> None:
    roles = "{{ messages | map(attribute='role') | join(' ') }}"
    assert render(roles) == "user"
    assert render(roles, system="") == "system user"


REFUSED = {
    "a mistake": ("{% for %}", "Expected an expression"),
    "a message of its own": ("{{ raise_exception('no system,\nplease') }}", "used: no system, please$"),
    "something undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "a division by zero": ("{{ 1 // 0 }}", "division"),
    "the way to Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "the way to Python by a filter": ("{{ (''|attr('__class__')).mro() }}", "unsafe|undefined"),
    "the way to Python by a format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "a function's own": ("{{ raise_exception.__globals__['json'] }}", "unsafe|undefined"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "another template": ("{% import 'x' as x %}", "no loader"),
    "loops within loops": (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "does not end",
    ),
    "a long range": ("{{ range(10 ** 9) | list }}", "too"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion|does not end"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion|memory|nested"),
    "a long text": ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "writes too much"),
    "a text that doubles": (
        "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "memory",
    ),
    "a large power": ("{{ 9 ** 9 ** 9 }}", "too large"),
    "a long power": ("{{ 999999 ** 999999 % 7 }}", "too large"),
    "a large factor": ("{{ 'x' * 10000000000 }}", "too large"),
    "a wide field": ("{{ 'x'.ljust(10000000000) }}", "too large"),
    "a wide filter": ("{{ 'x' | center(10000000000) }}", "too large"),
    "a filter that fills": ("{{ [1] | batch(10000000000, 0) | list }}", "too large"),
    "a constant that fills": (
        "{% set a = 'x' | center(900000) | replace(' ', '" + "y" * 80 + "') %}",
        "memory",
    ),
    "much filler": ("{{ lipsum(n=999999) }}", "does not end"),
}


@pytest.mark.spec("CHAT-4")
@pytest.mark.parametrize(("template", "why"), REFUSED.values(), ids=REFUSED)
def test_a_template_is_refused_in_one_line_for(template: str, why: str) -> None:
    with pytest.raises(ChatTemplateError, match=why) as caught:
        render(template)
    assert isinstance(caught.value, InputError)
    assert str(caught.value).startswith("the model's chat template cannot be used: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.spec("CHAT-4")
def test_whatever_it_did_the_tracing_of_others_goes_on() -> None:
    mine = sys.gettrace()
    assert not tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError):
            render("{% for %}")
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    render("a")
    assert not tracemalloc.is_tracing()
    assert sys.gettrace() is mine


@pytest.mark.spec("CHAT-4")
def test_ctrl_c_is_not_an_error_of_the_template() -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_chat("{{ strftime_now('%d') }}", {}, "hello", None, interrupted)


@pytest.mark.spec("CHAT-6")
@pytest.mark.parametrize("version", ["3.1.5", "2.11.3", "3", "3.1.5+local.6"])
def test_a_jinja_with_holes_in_its_sandbox_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "__version__", version)
    with pytest.raises(ChatTemplateError, match=f"needs jinja2 3.1.6 or later, not {re.escape(version)}"):
        render("a")


@pytest.mark.spec("CHAT-6")
@pytest.mark.parametrize("version", ["3.1.6", "3.1.6+local", "3.2", "3.2rc1", "3.2.0rc1", "4.0.0"])
def test_a_later_jinja_is_used(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "__version__", version)
    assert render("a") == "a"


WITHOUT_JINJA = """
import sys
sys.modules["jinja2"] = None  # an import now fails as if it were not installed
from refinfer.errors import ChatTemplateError
from refinfer.model.chat import render_chat
try:
    render_chat("a", {}, "hello", None, str)
except ChatTemplateError as error:
    print(error)
"""


@pytest.mark.spec("CHAT-6")
def test_without_jinja_one_line_says_how_to_install_it() -> None:
    command, root = [sys.executable, "-c", WITHOUT_JINJA], Path(refinfer.__file__).parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert output == "--chat needs the jinja2 package: pip install 'refinfer[hf]'\n"
