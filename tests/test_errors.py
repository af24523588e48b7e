"""Specifies `refinfer.errors`: which errors the package raises, and how their messages read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import refinfer
from refinfer import errors
from refinfer.errors import DamagedWeightsError, InputError, RefinferError

PACKAGE = Path(refinfer.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What is raised to be caught within the package, or because Python asks for it: where, and why.
OTHERS = {
    ("__init__.py", "AttributeError"): "a module's __getattr__ must raise it",
    ("cli/options.py", "argparse.ArgumentTypeError"): "argparse makes an InputError of it",
    ("offload/calibration.py", "ValueError"): "an entry that cannot be used counts as missing",
    ("weight_cache/provider.py", "KeyError"): "a mapping must raise it",
    ("cli/ending.py", "Stopped"): "it answers a signal",
    ("weight_cache/ownership.py", "PermissionError"): "the caller makes its own error of it",
    ("weight_cache/ownership.py", "taken_by"): "the caller makes its own error of it",
    ("weight_cache/publish.py", "taken_by"): "the caller makes its own error of it",
    ("units.py", "ValueError"): "the command line and budgets make their own errors of it",
    ("whole_file.py", "IsADirectoryError"): "a reader makes its own error of it",
    ("whole_file.py", "OSError"): "a reader makes its own error of it",
    ("whole_file.py", "ValueError"): "a reader makes its own error of it",
}

# Functions and classes whose arguments become the text of an error, and the number of the argument that does.
MESSAGES = dict.fromkeys(errors.__all__, 0) | {"ValueError": 0, "ArgumentTypeError": 0, "refuse": 0, "error": -1}


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def raised_in(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func)


def texts_in(module: str) -> Iterator[str]:
    """Yield the text of each message of a module; {} stands for what is put into it."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Call) and node.args and name_of(node.func) in MESSAGES:
            text = node.args[MESSAGES[name_of(node.func)]]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            if isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


@pytest.mark.spec("ERR-1")
def test_what_is_raised_on_purpose_is_one_of_the_tree_or_stays_within_the_package() -> None:
    made_by_functions = {"refuse", "damaged", "keys.error", "rope.error", "self.error"}
    others = {
        (module, name)
        for module in MODULES
        for name in raised_in(module)
        if name not in errors.__all__ and name not in made_by_functions
    }
    assert others == set(OTHERS)


@pytest.mark.spec("ERR-1")
@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_has_a_status_and_bad_input_is_what_has_status_2(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, RefinferError)
    assert error.exit_status == (2 if issubclass(error, InputError) else 1)


def faults_of(text: str) -> list[str]:
    """Return what keeps the text of a message from being one plain sentence."""
    sentence = text.replace("{}", "x")
    return [
        fault
        for fault, found in {
            "it is empty": not sentence.strip(),
            "it has several lines": "\n" in sentence,
            "it ends like a sentence on a page, or as if more was to come": re.search(r"[.!?,;: ]$", sentence),
            "it begins with a capital letter": re.match(r"[A-Z]", sentence),
            "it has a second sentence": re.search(r"[.!?] +[A-Z]", sentence),
            "it has two spaces or a space before a comma": re.search(r"  | [,;:.](?=\s|$)", sentence),
        }.items()
        if found
    ]


@pytest.mark.spec("ERR-1")
@pytest.mark.parametrize("module", MODULES)
def test_every_message_is_one_sentence_that_can_stand_within_a_line(module: str) -> None:
    assert {text: faults for text in texts_in(module) if (faults := faults_of(text))} == {}


@pytest.mark.spec("ERR-1")
def test_the_messages_of_the_package_are_found() -> None:
    found = [text for module in MODULES for text in texts_in(module)]
    assert len(found) > 150
    assert "the prompt is empty; give at least one token" in found


@pytest.mark.spec("ERR-1")
@pytest.mark.parametrize(
    "text", ["", "It fails", "it fails.", "it fails. It does", "it\nfails", "it fails: ", "it  is"]
)
def test_a_message_that_is_no_plain_sentence_is_noticed(text: str) -> None:
    assert faults_of(text)


@pytest.mark.spec("ERR-4")
def test_damage_says_to_start_again_unless_something_else_helps() -> None:
    assert str(DamagedWeightsError("it is damaged")) == "it is damaged; start again"
    other = DamagedWeightsError("it is damaged", "remove it")
    assert (str(other), other.reason) == ("it is damaged; remove it", "it is damaged")
