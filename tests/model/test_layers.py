"""The arithmetic of a layer, against textbook formulas in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.arrays import Float32Array
from refinfer.model.config import SHAPES, ModelConfig
from refinfer.model.layers import attention, causal_mask, rms_norm, rope, rope_frequencies, rope_tables, silu_multiply
from words import require_near

TINY: ModelConfig = SHAPES["tiny"]
LLAMA_1B: ModelConfig = SHAPES["llama-1b"]


def normal(seed: int, *shape: int) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rotated(x: Float32Array, positions: list[int], config: ModelConfig) -> Float32Array:
    """Rotate the heads `[M, H, hd]` of tokens at `positions`."""
    tables = rope_tables(config, max(positions) + 1)
    halves = x.reshape(*x.shape[:2], 2, -1).copy()
    rope(halves, tables.cos[positions], tables.sin[positions], np.empty_like(halves))
    return halves.reshape(x.shape)


@pytest.mark.spec("MODEL-1")
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
def test_rms_norm_gives_rows_of_root_mean_square_one(M: int, D: int, seed: int) -> None:
    x = normal(seed, M, D) * 10 + 1
    out = np.empty_like(x)
    rms_norm(x, np.ones(D, np.float32), 0.0, out)
    np.testing.assert_allclose(np.sqrt((out.astype(np.float64) ** 2).mean(-1)), 1, rtol=1e-5)


@pytest.mark.spec("MODEL-1")
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (1, 2, 24), (3, 2, 24)], ids=str)
def test_rms_norm_equals_its_formula(shape: tuple[int, ...]) -> None:
    x, weight = normal(0, *shape), normal(1, shape[-1])
    out = np.empty_like(x)
    rms_norm(x, weight, 1e-5, out)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(out, exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight, rtol=2e-6)


@pytest.mark.spec("MODEL-2")
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(0, 9))
def test_rope_keeps_the_length_of_every_head(positions: list[int], seed: int) -> None:
    x = normal(seed, len(positions), 3, TINY.head_dim)
    np.testing.assert_allclose(
        np.linalg.norm(rotated(x, positions, TINY), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


@pytest.mark.spec("MODEL-3")
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.integers(0, 9))
def test_after_rope_only_the_distance_of_two_positions_matters(i: int, j: int, shift: int, seed: int) -> None:
    q, k = normal(seed, 1, 1, LLAMA_1B.head_dim), normal(seed + 10, 1, 1, LLAMA_1B.head_dim)

    def product(a: int, b: int) -> float:
        return float((rotated(q, [a], LLAMA_1B) * rotated(k, [b], LLAMA_1B)).sum())

    assert product(i, j) == pytest.approx(product(i + shift, j + shift), abs=2e-3)


@pytest.mark.spec("MODEL-3")
def test_rope_is_a_rotation_of_the_two_halves_of_a_head() -> None:
    x = normal(0, 2, 1, TINY.head_dim)
    half = TINY.head_dim // 2
    pairs = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    angle = np.array([0, 7])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(rotated(x, [0, 7], TINY), np.concatenate((turned.real, turned.imag), axis=-1), atol=2e-6)


@pytest.mark.spec("MODEL-3", "MODEL-8")
@pytest.mark.parametrize("name", ["llama2-7b", "codellama-34b", "llama3-8b", "llama-1b", "storyteller"])
def test_rope_frequencies_are_those_of_transformers_to_the_last_bit_but_one(name: str) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "rope_frequencies.json").read_text())[name]
    ours, theirs = rope_frequencies(SHAPES[name]), np.array(golden, np.float32)
    assert np.abs(ours.view(np.int32) - theirs.view(np.int32)).max() <= 1
    assert np.count_nonzero(ours != theirs) <= 1


AXES = ("group", "query head", "query", "number")


def attended(q: Float32Array, k: Float32Array, v: Float32Array) -> Float32Array:
    """Return what `attention` makes of queries `[G, R, M, hd]`, keys and values `[G, P, hd]`, in memory that was used.

    The queries are the last M positions.
    """
    (G, R, M, _), P = q.shape, k.shape[1]
    out, scores = np.full_like(q, np.nan), np.full((G, R, M, P), np.nan, np.float32)
    keys = np.ascontiguousarray(k.transpose(0, 2, 1))[:, None]
    attention(q, keys, v[:, None], scores, causal_mask(M) if M > 1 else None, out)
    return out


def require_outputs(out: Float32Array, expected: npt.NDArray[Any], what: str = "the output", **off: float) -> None:
    """Require that `attended` gave these outputs, each off by so little."""
    unwritten = "nothing was written into `out`: `out = ...` makes a new name, `out[...] = ...` writes"
    require_near(out, expected, what, AXES, filler=np.nan, unwritten=unwritten, **off)


@pytest.mark.spec("MODEL-4")
@pytest.mark.parametrize("P", [1, 4], ids=["one position", "four positions"])
def test_a_query_that_agrees_with_all_keys_alike_gets_the_mean_of_their_values(P: int) -> None:
    q, k, v = np.zeros((1, 2, 1, 4), np.float32), normal(0, 1, P, 4), normal(1, 1, P, 4)
    require_outputs(attended(q, k, v), np.full_like(q, v[0].mean(0)), atol=1e-6)


@pytest.mark.spec("MODEL-4", "MODEL-7")
@pytest.mark.parametrize(("M", "before"), [(2, 0), (3, 2)], ids=["2 tokens", "3 tokens after 2 others"])
def test_a_later_position_has_no_effect_on_an_earlier_query(M: int, before: int) -> None:
    q, k, v = normal(0, 1, 1, M, 4), normal(1, 1, before + M, 4), normal(2, 1, before + M, 4)
    expected = attended(q, k, v)
    for later in range(M - 1, 0, -1):
        k[:, before + later :], v[:, before + later :] = 3, 50
        what = f"with another key and value at position {before + later}, the output"
        require_outputs(attended(q, k, v)[:, :, :later], expected[:, :, :later], what, atol=1e-6)


@pytest.mark.spec("MODEL-4")
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 6), st.integers(0, 9))
def test_attention_equals_the_textbook_formula_with_repeated_heads(
    G: int, R: int, M: int, before: int, seed: int
) -> None:
    hd, P = 4, before + M
    q, k, v = normal(seed, G, R, M, hd), normal(seed + 1, G, P, hd), normal(seed + 2, G, P, hd)
    out = attended(q, k, v)
    repeated_k, repeated_v = (np.repeat(t.astype(np.float64), R, axis=0).reshape(G, R, P, hd) for t in (k, v))
    scores = q @ repeated_k.transpose(0, 1, 3, 2) / np.sqrt(hd)
    later = np.arange(P)[None] > np.arange(before, P)[:, None]
    weights = np.exp(np.where(later, -np.inf, scores))
    require_outputs(out, weights @ repeated_v / weights.sum(-1, keepdims=True), atol=2e-6, rtol=1e-7)


@pytest.mark.spec("MODEL-4")
def test_attention_survives_scores_whose_exponential_would_overflow() -> None:
    q, k, v = np.full((1, 1, 1, 4), 300.0, np.float32), np.full((1, 3, 4), 300.0, np.float32), normal(0, 1, 3, 4)
    require_outputs(attended(q, k, v), np.full_like(q, v[0].mean(0)), rtol=1e-6)


@pytest.mark.spec("MODEL-4")
def test_attention_survives_heads_whose_scores_are_of_very_different_size() -> None:
    q, k, v = np.ones((1, 2, 1, 4), np.float32), np.full((1, 3, 4), 300.0, np.float32), normal(0, 1, 3, 4)
    q[0, 0], q[0, 1] = 300, -300  # all keys agree alike with a head's query
    require_outputs(attended(q, k, v), np.full_like(q, v[0].mean(0)), rtol=1e-6)


@pytest.mark.spec("MODEL-6")
@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20))
def test_silu_multiply_equals_its_formula(gates: list[float]) -> None:
    gate, up = np.array([gates], np.float32), np.full((1, len(gates)), 3.0, np.float32)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * 3
    with np.errstate(over="ignore"):  # as the transformer does
        silu_multiply(gate, up, np.empty_like(gate))
    np.testing.assert_allclose(gate, exact, rtol=1e-5, atol=1e-30)


@pytest.mark.spec("MODEL-5")
@pytest.mark.parametrize("config", [TINY, LLAMA_1B], ids=["plain", "llama3 scaling"])
def test_tables_and_masks_are_float32(config: ModelConfig) -> None:
    tables = rope_tables(config, 5)
    assert {tables.cos.dtype, tables.sin.dtype, causal_mask(3).dtype} == {np.dtype(np.float32)}


@pytest.mark.spec("MODEL-6")
def test_a_gate_far_below_zero_gives_zero_without_a_warning() -> None:
    gate, up = np.array([[-1e30]], np.float32), np.ones((1, 1), np.float32)
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error")
        silu_multiply(gate, up, np.empty_like(gate))
    assert gate[0, 0] == 0
