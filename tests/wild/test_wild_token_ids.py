"""Token ids as people have them: lists, arrays, and what looks like them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from refinfer.errors import InputError, RequestError
from refinfer.generate import Session

ROWS = {
    "list": [1, 2, 3],
    "tuple": (1, 2, 3),
    "range": range(1, 4),
    "array of int64": np.array([1, 2, 3]),
    "array of uint8": np.array([1, 2, 3], np.uint8),
    "numbers of numpy": [np.int32(1), np.int64(2), 3],
}
NO_ROWS = {
    "two rows": ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
    "a row within a row": ([[1, 2, 3]], "[[1, 2, 3]]"),
    "an array of rows": (np.array([[1, 2, 3]]), "array([[1, 2, 3]])"),
    "an array of a row of one": (np.array([[1], [2]]), "array([[1], [2]])"),
    "a number of an array": (np.array(1), "array(1)"),
    "a number": (1, "1"),
    "fractions": ([1.0, 2.5], "[1.0, 2.5]"),
    "an array of fractions": (np.array([1.0, 2.0]), "array([1., 2.])"),
    "texts": (["1", "2"], "['1', '2']"),
    "a text": ("123", "'123'"),
    "bytes": (b"123", "b'123'"),
    "truth values": ([True, False], "[True, False]"),
    "an array of truth values": (np.array([True, False]), "array([ True, False])"),
    "nothing in between": ([1, None, 3], "[1, None, 3]"),
}


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
def test_token_ids_may_be_a(ids: Any, storyteller: Session) -> None:
    "".join(storyteller.generate(token_ids=ids, max_tokens=1))
    assert storyteller.stats is not None
    assert storyteller.stats.prompt_token_ids == (1, 2, 3)
    assert np.array_equal(storyteller.logits(ids), storyteller.logits([1, 2, 3]))


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize(("ids", "shown"), NO_ROWS.values(), ids=NO_ROWS)
def test_token_ids_are_refused_in_one_line_if_they_are(ids: Any, shown: str, storyteller: Session) -> None:
    why = f"^token_ids must be one row of whole numbers, not {re.escape(shown)}$"
    for use in (lambda: storyteller.generate(token_ids=ids), lambda: storyteller.logits(ids)):
        with pytest.raises(RequestError, match=why) as caught:
            use()
        assert isinstance(caught.value, InputError)


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("prompt", [[1, 2], b"a", 5], ids=repr)
def test_a_prompt_that_is_not_a_text_is_refused_and_token_ids_are_named(storyteller: Session, prompt: Any) -> None:
    with pytest.raises(InputError, match=r"a prompt is a text, not .*; give token ids as token_ids"):
        storyteller.generate(prompt)
