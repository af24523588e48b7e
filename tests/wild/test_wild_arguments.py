"""Numbers as people give them to the Python interface: Python's, numpy's, and what looks like them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import refinfer
from refinfer.errors import RequestError
from refinfer.generate import Session
from refinfer.model.sampler import Sampling, probabilities

NO_WHOLE_NUMBER = ["3", 2.5, 3.0, True, [3], float("nan"), -1, np.array([3])]
NO_NUMBER = ["0.5", True, [0.5], float("nan"), float("inf"), 10**400, 1j]
WHOLE_OF_A_REQUEST = {"max_tokens": "max-tokens", "top_k": "top-k", "seed": "seed"}
NUMBERS_OF_A_REQUEST = {"temperature": "temperature", "top_p": "top-p"}
WHOLE_OF_LOADING = {
    "max_positions": "max_positions",
    "threads": "threads",
    "prefetch_ring": "a prefetch ring",
}


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("value", NO_WHOLE_NUMBER, ids=repr)
@pytest.mark.parametrize(("argument", "name"), WHOLE_OF_A_REQUEST.items(), ids=WHOLE_OF_A_REQUEST)
def test_a_request_counts_in_whole_numbers(argument: str, name: str, value: Any, storyteller: Session) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be a whole number"):
        storyteller.generate("Once", **{argument: value})


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(("argument", "name"), NUMBERS_OF_A_REQUEST.items(), ids=NUMBERS_OF_A_REQUEST)
def test_a_request_measures_in_finite_numbers(argument: str, name: str, value: Any, storyteller: Session) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be "):
        storyteller.generate("Once", **{argument: value})


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("value", NO_WHOLE_NUMBER, ids=repr)
@pytest.mark.parametrize(("argument", "name"), WHOLE_OF_LOADING.items(), ids=WHOLE_OF_LOADING)
def test_loading_counts_in_whole_numbers(argument: str, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be a whole number"):
        refinfer.load(**{argument: value})


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("value", NO_WHOLE_NUMBER, ids=repr)
def test_prefetch_threads_are_counted_in_whole_numbers(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^there can be 0 to .* prefetch threads, not "):
        refinfer.load(prefetch_threads=value)


@pytest.mark.spec("GEN-24")
@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: repr(value)[:20])
def test_a_disk_is_limited_to_a_finite_number_of_bytes_per_second(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^disk_bandwidth must be above 0 bytes per second, not "):
        refinfer.load(disk_bandwidth=value)


@pytest.mark.spec("GEN-24")
def test_numbers_of_numpy_are_numbers(storyteller: Session) -> None:
    asked = {"max_tokens": 3, "temperature": 0.5, "top_k": 5, "top_p": 0.5, "seed": 1}
    numpys: dict[str, Any] = {
        "max_tokens": np.int64(3),
        "temperature": np.float32(0.5),
        "top_k": np.uint8(5),
        "top_p": np.float64(0.5),
        "seed": np.int32(1),
    }
    assert list(storyteller.generate("Once", **numpys)) == list(storyteller.generate("Once", **asked))  # type: ignore[arg-type]


@pytest.mark.spec("GEN-24")
def test_a_small_number_of_numpy_chooses_among_more_tokens_than_it_can_count() -> None:
    logits = np.linspace(-3, 3, 1000, dtype=np.float32)
    numpys: dict[str, Any] = {"temperature": np.float16(1.0), "top_k": np.uint8(200), "top_p": np.float16(0.5)}
    expected = probabilities(logits, Sampling(temperature=1.0, top_k=200, top_p=0.5))
    np.testing.assert_array_equal(probabilities(logits, Sampling(**numpys)), expected)


@pytest.mark.spec("GEN-24")
def test_small_numbers_of_numpy_do_not_overflow(storyteller: Session) -> None:
    asked: dict[str, Any] = {"max_positions": np.uint8(100), "threads": np.int64(1), "prefetch_threads": np.uint8(1)}
    with refinfer.load(budget="60%", weights="f32", weight_cache=None, **asked) as session:
        few: Any = np.uint8(5)
        many: Any = np.uint8(255)
        text = "".join(session.generate("Once", max_tokens=few))
        assert text == "".join(storyteller.generate("Once", max_tokens=5))
        with pytest.raises(RequestError, match="do not fit the 100 positions"):
            session.generate("Once", max_tokens=many)
        assert session.stats is not None
        json.dumps(session.stats.to_json())
