"""A chat: one turn of a user, put into the form in which a model was taught to answer.

Runs the checkpoint's chat template as `transformers` does. Leaves to others: where the template comes from
(`tokenizer_config`), token ids (`tokenizer`), the time.
Read more: tutorial 07; clauses CHAT-1 to CHAT-5.

A template is a program in Jinja's language that came with the weights, so it runs in Jinja's sandbox, which keeps it
from files and from Python, and within limits on its steps, its memory and what it writes.
"""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from refinfer.errors import ChatTemplateError
from refinfer.units import shortened

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["render_chat"]

_LEAST_JINJA: Final = (3, 1, 6)  # programs could leave the sandbox of earlier versions
_MOST_STEPS: Final = 300_000  # lines of Python; a published template runs some hundreds
_MOST_NBYTES: Final = 64_000_000
_MOST_CHARACTERS: Final = 4_000_000
_MOST_NUMBER: Final = 1_000_000  # as a factor, or where a function is given a width or a count
_MOST_EXPONENT: Final = 100


def render_chat(
    template: str, names: Mapping[str, str], prompt: str, system: str | None, strftime_now: Callable[[str], str]
) -> str:
    """Return the text that asks a model for its answer to `prompt`, after the instructions of `system`, if any.

    A template that can switch thinking on and off does what it does by default: `enable_thinking` is not given.

    Args:
        template: the text of the template.
        names: the special tokens that it may use, such as `bos_token`.
        prompt: what the user says.
        system: what the system says before; None leaves that to the template.
        strftime_now: the time of day in a given format.

    Raises:
        ChatTemplateError: the template cannot be run, refuses the messages, or does too much.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    environment = _environment(strftime_now)
    try:
        compiled = environment.from_string(template)
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        with _within_limits():
            return _joined(compiled.generate({**names, **given}))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a stranger's program can raise, MemoryError and RecursionError included
        why = shortened(" ".join(str(error).split()), 200) or type(error).__name__
        raise ChatTemplateError(f"the model's chat template cannot be used: {why}") from None


def _joined(pieces: Iterator[str]) -> str:
    written, length = [], 0
    for piece in pieces:
        written.append(piece)
        length += len(piece)
        if length > _MOST_CHARACTERS:
            raise ChatTemplateError("it writes too much")
    return "".join(written)


def _environment(strftime_now: Callable[[str], str]) -> ImmutableSandboxedEnvironment:
    """Return the surroundings of a template, those of `transformers`."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ChatTemplateError("--chat needs the jinja2 package: pip install 'refinfer[hf]'") from None
    if tuple(map(int, re.findall("[0-9]+", jinja2.__version__)[:3])) < _LEAST_JINJA:
        least = ".".join(map(str, _LEAST_JINJA))
        raise ChatTemplateError(f"--chat needs jinja2 {least} or later, not {jinja2.__version__}")

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
            _require_small(left, right, most=_MOST_EXPONENT if operator == "**" else _MOST_NUMBER)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            _require_small(*args, *kwargs.values())
            return super().call(context, function, *args, **kwargs)

    class Generation(Extension):
        """`{% generation %}` marks what an assistant wrote, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  (Jinja asks for a set)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> None:
        raise ChatTemplateError(str(message))

    environment = Limited(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # or constants would be computed while a template is read, outside the limits
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.filters |= {name: _limited(function) for name, function in environment.filters.items()}
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as `transformers` writes it: Jinja's own filter would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses large numbers."""

    @wraps(function)  # with the mark of a filter that asks Jinja for its surroundings
    def limited(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        _require_small(*args, *kwargs.values())
        return function(*args, **kwargs)

    return limited


def _require_small(*values: object, most: int = _MOST_NUMBER) -> None:
    """Refuse numbers with which one step would take for ever, or fill the memory."""
    if any(isinstance(value, int) and abs(value) > most for value in values):
        raise ChatTemplateError("it computes with too large a number")


@contextmanager
def _within_limits() -> Iterator[None]:
    """Count the lines of Python that run, and the memory they take, and raise ChatTemplateError at too many."""
    steps, tracer, measured = 0, sys.gettrace(), tracemalloc.is_tracing()
    if not measured:
        tracemalloc.start()
    most = tracemalloc.get_traced_memory()[0] + _MOST_NBYTES

    def count(_frame: FrameType, _event: str, _argument: object) -> Callable[..., Any]:
        nonlocal steps
        steps += 1
        if steps > _MOST_STEPS or tracemalloc.get_traced_memory()[0] > most:
            raise ChatTemplateError("it does not end, or needs too much memory")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(tracer)
        if not measured:
            tracemalloc.stop()
