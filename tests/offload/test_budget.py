"""Specifies `refinfer.offload.budget`: a count of bytes that never exceeds its limit, and how people write one."""

from __future__ import annotations

import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from refinfer.errors import BudgetError, InputError
from refinfer.offload.budget import Budget, parse_budget
from refinfer.units import shown

WATCHDOG_S = 60


class BudgetAgainstAList(RuleBasedStateMachine):
    """Random acquiring and releasing, compared with a plain list of what is in use."""

    @initialize(limit=st.integers(1, 1000))
    def begin(self, limit: int) -> None:
        self.budget = Budget(limit)
        self.held: list[int] = []
        self.peak = 0

    @rule(nbytes=st.integers(0, 700))
    def acquire(self, nbytes: int) -> None:
        if sum(self.held) + nbytes > self.budget.limit:
            with pytest.raises(BudgetError):
                self.budget.acquire(nbytes, "a thing")
            return
        self.budget.acquire(nbytes, "a thing")
        self.held.append(nbytes)
        self.peak = max(self.peak, sum(self.held))

    @rule(parts=st.lists(st.integers(0, 400), max_size=4))
    def acquire_all(self, parts: list[int]) -> None:
        named = {f"part {i}": nbytes for i, nbytes in enumerate(parts)}
        if sum(self.held) + sum(parts) > self.budget.limit:
            with pytest.raises(BudgetError):
                self.budget.acquire_all(named)
            return
        self.budget.acquire_all(named)
        self.held.extend(parts)
        self.peak = max(self.peak, sum(self.held))

    @rule(which=st.integers(0, 50))
    def release(self, which: int) -> None:
        if self.held:
            self.budget.release(self.held.pop(which % len(self.held)))

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "budget"):
            assert self.budget.in_use == sum(self.held) <= self.budget.limit
            assert self.budget.peak == self.peak <= self.budget.limit


@pytest.mark.spec("BUDGET-1", "BUDGET-2")
def test_a_budget_counts_what_a_list_of_what_is_in_use_adds_up_to() -> None:
    run_state_machine_as_test(BudgetAgainstAList, settings=settings(max_examples=40, stateful_step_count=30))


@pytest.mark.spec("BUDGET-1")
def test_a_budget_is_used_to_the_last_byte() -> None:
    budget = Budget(100)
    budget.acquire(100, "everything")
    with pytest.raises(BudgetError):
        budget.acquire(1, "one byte more")
    budget.acquire(0, "nothing")
    assert (budget.in_use, budget.peak) == (100, 100)


@pytest.mark.spec("BUDGET-1", "ERR-1")
def test_a_part_that_does_not_fit_is_named_with_what_is_left_and_counts_nothing() -> None:
    budget = Budget(3_000_000)
    budget.acquire(1_000_000, "the ring")
    with pytest.raises(BudgetError) as refused:
        budget.acquire(2_500_000, "the KV cache")
    text = "the KV cache needs 2.5 MB, but of the budget of 3.0 MB only 2.0 MB are left"
    assert str(refused.value) == text
    assert isinstance(refused.value, InputError)
    assert (budget.in_use, budget.peak) == (1_000_000, 1_000_000)
    budget.acquire(2_000_000, "what is left")


@pytest.mark.spec("BUDGET-1", "BUDGET-2", "ERR-1")
def test_parts_that_do_not_fit_together_are_refused_by_the_first_that_does_not_and_count_nothing() -> None:
    budget = Budget(3_000_000)
    budget.acquire(500_000, "the KV cache")
    with pytest.raises(BudgetError) as refused:
        budget.acquire_all({"locked chunks": 1_500_000, "ring": 1_000_001, "scratch": 1})
    assert str(refused.value) == "ring needs 1.0 MB, but of the budget of 3.0 MB only 1.0 MB are left"
    assert (budget.in_use, budget.peak) == (500_000, 500_000)
    budget.acquire_all({"locked chunks": 1_500_000, "ring": 1_000_000})
    assert (budget.in_use, budget.peak) == (3_000_000, 3_000_000)


class Meddling(int):
    """A number of bytes that, while it is being added, lets another thread try to acquire the same number."""

    other: threading.Thread

    def __radd__(self, in_use: int) -> int:
        if self.other.ident is None:
            self.other.start()
            self.other.join(timeout=0.1)  # it waits for us, or it has got through
        return in_use + int(self)


@pytest.mark.spec("BUDGET-1", "BUDGET-2")
def test_between_looking_and_counting_no_other_thread_gets_in() -> None:
    budget, outcomes = Budget(100), []

    def acquire(nbytes: int) -> None:
        try:
            budget.acquire(nbytes, "half and more")
            outcomes.append("granted")
        except BudgetError:
            outcomes.append("refused")

    other = threading.Thread(target=acquire, args=(60,), daemon=True)
    nbytes = Meddling(60)
    nbytes.other = other
    acquire(nbytes)
    other.join(WATCHDOG_S)
    assert sorted(outcomes) == ["granted", "refused"]
    assert (budget.in_use, budget.peak) == (60, 60)


@pytest.mark.spec("BUDGET-2")
def test_the_peak_of_threads_that_hold_at_once_is_what_they_hold_together() -> None:
    budget, n = Budget(8 * 11), 8
    holding, seen = threading.Barrier(n, timeout=WATCHDOG_S), []

    def hold() -> None:
        for _ in range(200):  # alone, now and then together
            budget.acquire(11, "a share")
            budget.release(11)
        holding.wait()
        budget.acquire(11, "a share")
        holding.wait()
        seen.append(budget.in_use)
        holding.wait()
        budget.release(11)

    threads = [threading.Thread(target=hold, daemon=True) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert seen == [8 * 11] * n
    assert (budget.in_use, budget.peak) == (0, 8 * 11)


@pytest.mark.spec("BUDGET-3")
@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("300MB", 300_000_000),
        ("300 mb", 300_000_000),
        ("1.5GiB", 3 << 29),
        (" 2KiB ", 2048),
        ("40%", 400_000),
        ("40 %", 400_000),
        ("12.5%", 125_000),
        ("100%", 1_000_000),
        ("250%", 2_500_000),
        ("0.0001%", 1),
    ],
)
def test_a_budget_is_a_size_or_a_share_of_the_streamable_weights(text: str, nbytes: int) -> None:
    assert parse_budget(text, 1_000_000) == nbytes


@pytest.mark.spec("BUDGET-4")
@pytest.mark.parametrize("text", ["auto", " auto "])
def test_auto_is_nine_tenths_of_what_is_available_and_refused_if_nobody_knows(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinfer.offload.budget.available_bytes", lambda: 1_000_000)
    assert parse_budget(text, 1) == 900_000
    monkeypatch.setattr("refinfer.offload.budget.available_bytes", lambda: None)
    with pytest.raises(BudgetError, match="does not report how much memory is left; give the budget as a size"):
        parse_budget(text, 1)


@pytest.mark.spec("BUDGET-3")
@given(share=st.integers(1, 400), streamable=st.integers(100, 1 << 40))
def test_a_share_is_that_part_of_the_streamable_weights(share: int, streamable: int) -> None:
    assert abs(parse_budget(f"{share}%", streamable) - streamable * share // 100) <= 1


REFUSED = [
    "", " ", "abc", "-5", "0", "0MB", "0%", "0.00001%", "-40%", "%", "40%%", "40%MB", "5 parsecs", "1e3", "nan", "nan%",
    "٤٠%", "５０MB", "1_0%",
    "inf", "inf%", "40.%", ".5%", "1,5GB", "0x10", "1 000", "9" * 400, "9" * 30 + "GB", "9" * 400 + "%",
]  # fmt: skip


@pytest.mark.spec("BUDGET-3", "ERR-1", "UNIT-3")
@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[-20:])
def test_anything_else_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(BudgetError) as refused:
        parse_budget(text, 1_000_000)
    assert shown(text) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.spec("BUDGET-5", "ERR-1")
@pytest.mark.parametrize(("written", "nbytes"), [("0.4", 400_000), (0.05, 50_000), (" 0.125 ", 125_000)])
def test_a_number_below_one_is_answered_with_the_share_that_it_means(written: float | str, nbytes: int) -> None:
    with pytest.raises(BudgetError) as refused:
        parse_budget(written, 1_000_000)
    share = str(refused.value).rpartition("; for a share of the weights write ")[2]
    assert parse_budget(share, 1_000_000) == nbytes


@pytest.mark.spec("BUDGET-3", "ERR-1", "UNIT-3")
@given(st.text(max_size=12) | st.from_regex(r"\s*[0-9.]{0,6}\s*[%A-Za-z]{0,4}\s*", fullmatch=True))
def test_whatever_is_written_is_a_number_of_bytes_or_one_named_error(text: str) -> None:
    try:
        nbytes = parse_budget(text, 12_345_678)
    except BudgetError as error:
        nbytes, said = 1, str(error)
    else:
        said = "a size"
    assert nbytes >= 1
    assert re.search("size|at least one byte", said)
