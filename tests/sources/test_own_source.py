"""Specifies `refinfer.sources.own_source` and `load(source=...)`: generating with somebody's own weight source."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refinfer
from refinfer.errors import DamagedWeightsError, GenerationError, RequestError
from refinfer.model.checkpoint import open_checkpoint
from refinfer.model.config import ModelConfig
from refinfer.model.weights import RowMajorSource, WeightSource


class Own(RowMajorSource):
    """A source as somebody might write it; counts how often it was closed."""

    closed = 0

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        super().__init__(config, open_checkpoint(folder))

    def close(self) -> None:
        self.closed += 1
        super().close()


@pytest.mark.spec("GEN-23")
def test_a_session_runs_on_somebodys_own_source_and_closes_it(tiny_folder: Path) -> None:
    with refinfer.load(tiny_folder, weight_cache="off") as ours:
        expected = ours.logits([1, 2, 3])
    begun = time.monotonic()
    with refinfer.load(tiny_folder, source=Own) as session:
        assert 0 <= session.weight_cache.load_or_build_s <= time.monotonic() - begun
        source = session.source
        assert isinstance(source, Own)
        text = "".join(session.generate(token_ids=[1, 2, 3], max_tokens=4))
        np.testing.assert_array_equal(session.logits([1, 2, 3]), expected)
        assert session.stats is not None
        assert (session.stats.text, len(session.stats.token_ids)) == (text, 4)
        assert session.weight_cache.state == "off"
        assert source.closed == 0
    assert source.closed == 1


@pytest.mark.spec("GEN-23")
def test_no_weight_of_the_folder_is_read_unless_the_source_reads_it(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with refinfer.load(tmp_path, source=lambda config, _: Own(config, tiny_folder)) as session:
        assert session.logits([1]).shape == (1, 261)


def half(config: ModelConfig, folder: Path) -> Any:
    return object()


def other(config: ModelConfig, folder: Path) -> WeightSource:
    source = Own(config, folder)
    source.config = replace(config, rms_norm_eps=0.5)
    return source


def failing(config: ModelConfig, folder: Path) -> WeightSource:
    raise ZeroDivisionError


WRONG: dict[str, tuple[Any, str]] = {
    "no function": (3, "source must be a class or function of a config and a folder, not int"),
    "no source": (half, "source gave object, which is no weight source: it lacks config, forward_pass, close"),
    "another model": (other, "source gave weights for another model: its config is not that of "),
}


@pytest.mark.spec("GEN-23", "ERR-1")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_source_of_this_model_is_refused_by_name(name: str, tiny_folder: Path) -> None:
    source, why = WRONG[name]
    with pytest.raises(RequestError) as refused:
        refinfer.load(tiny_folder, source=source)
    assert str(refused.value).startswith(why)


@pytest.mark.spec("GEN-23", "GEN-8")
def test_a_source_of_another_model_is_closed_when_it_is_refused(tiny_folder: Path) -> None:
    made: list[WeightSource] = []

    def make(config: ModelConfig, folder: Path) -> WeightSource:
        made.append(other(config, folder))
        return made[-1]

    with pytest.raises(RequestError, match="for another model"):
        refinfer.load(tiny_folder, source=make)
    assert [source.closed for source in made if isinstance(source, Own)] == [1]


@pytest.mark.spec("GEN-23", "GEN-8")
def test_a_source_is_closed_if_there_is_no_memory_for_the_transformer(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Own] = []

    def make(config: ModelConfig, folder: Path) -> WeightSource:
        made.append(Own(config, folder))
        return made[-1]

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("refinfer.engine.Transformer", fails)
    with pytest.raises(MemoryError):
        refinfer.load(tiny_folder, source=make)
    assert [source.closed for source in made] == [1]


@pytest.mark.spec("GEN-23")
def test_a_source_itself_in_the_place_of_its_class_is_refused(tiny_folder: Path, tiny_source: RowMajorSource) -> None:
    with pytest.raises(RequestError, match="not RowMajorSource"):
        refinfer.load(tiny_folder, source=tiny_source)  # type: ignore[arg-type]


@pytest.mark.spec("GEN-23")
def test_what_making_a_source_raises_reaches_the_caller(tiny_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        refinfer.load(tiny_folder, source=failing)


@pytest.mark.spec("GEN-23")
@pytest.mark.parametrize(
    "option", [{"weights": "int8"}, {"budget": "60%"}, {"weight_cache": ":memory"}, {"lock_memory": True}], ids=str
)
def test_an_option_of_our_own_weights_does_not_go_with_another_source(
    option: dict[str, Any], tiny_folder: Path
) -> None:
    with pytest.raises(RequestError, match=f"source takes the place of {next(iter(option))}$"):
        refinfer.load(tiny_folder, source=Own, **option)


@pytest.mark.spec("GEN-23", "GEN-16")
def test_a_source_that_finds_damage_is_made_once_more_and_then_named(tiny_folder: Path) -> None:
    made: list[WeightSource] = []

    class Damaged(Own):
        def forward_pass(self) -> Any:
            raise DamagedWeightsError("mine is damaged")

    def make(config: ModelConfig, folder: Path) -> WeightSource:
        made.append(Damaged(config, folder))
        return made[-1]

    with refinfer.load(tiny_folder, source=make) as session:
        with pytest.raises(DamagedWeightsError, match=r"^mine is damaged; "):
            list(session.generate(token_ids=[1], max_tokens=1))
        assert len(made) == 2


@pytest.mark.spec("GEN-23", "GEN-8")
def test_a_closed_session_refuses_its_own_source_too(tiny_folder: Path) -> None:
    session = refinfer.load(tiny_folder, source=Own)
    source = session.source
    session.close()
    with pytest.raises(GenerationError, match="closed"), source.forward_pass():
        pass
