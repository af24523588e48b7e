"""Specifies `refinfer.units`: sizes as people write and read them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinfer.units import format_nbytes, parse_integer, parse_nbytes, parse_number, shortened, shown

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


@pytest.mark.spec("UNIT-1")
@given(
    whole=st.integers(1, 9_000),
    decimals=st.none() | st.integers(0, 999),
    unit=st.sampled_from(list(UNITS)),
    gap=st.sampled_from(["", " ", "\t"]),
    change=st.sampled_from([str, str.lower, str.upper, lambda text: f" {text}\n"]),
)
def test_a_size_is_its_number_times_its_unit(
    whole: int, decimals: int | None, unit: str, gap: str, change: Callable[[str], str]
) -> None:
    number = f"{whole}" if decimals is None else f"{whole}.{decimals:03}"
    exact = Fraction(number) * UNITS[unit]
    assert abs(parse_nbytes(change(f"{number}{gap}{unit}")) - exact) <= max(1, exact / 2**52)


@pytest.mark.spec("UNIT-1")
@pytest.mark.parametrize("unit", UNITS)
def test_one_of_each_unit_is_that_unit(unit: str) -> None:
    assert parse_nbytes(f"1{unit}") == UNITS[unit]


@pytest.mark.spec("UNIT-1")
def test_the_smallest_and_the_largest_size_are_read() -> None:
    assert parse_nbytes("1") == 1
    assert parse_nbytes("0.001KB") == 1
    assert parse_nbytes("8000000 TB") == 8 * 10**18


@pytest.mark.spec("UNIT-1")
@pytest.mark.parametrize(
    "text", ["", " ", "MB", "lots", "-5MB", "+5MB", "5 5MB", "1e6", "5XB", "5M", "1_000", "nan", "inf", ".5MB", "5.MB",
             "1,5GB", "5MB/s", "50%", "1\n2"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size such as 300MB or 1\.5GiB"):
        parse_nbytes(text)


@pytest.mark.spec("UNIT-1")
@pytest.mark.parametrize("text", ["0", "0.9", "0GB", "0.0001KB", "8388608TiB", "9" * 400])
def test_a_size_below_one_byte_or_beyond_what_a_file_can_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be at least one byte and less than 2\^63"):
        parse_nbytes(text)


@pytest.mark.spec("UNIT-2")
@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (123_456, "123 kB"),
        (4_754_528, "4.8 MB"),
        (2_097_152_000, "2.1 GB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (137_953_300_000, "138 GB"),
        (5 * 10**12, "5.0 TB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_bytes_are_shown_in_powers_of_ten(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@pytest.mark.spec("UNIT-2")
@given(nbytes=st.integers(0, 10**13))
def test_a_size_that_is_shown_is_right_to_one_in_twenty(nbytes: int) -> None:
    shown = format_nbytes(nbytes)
    number, unit = shown.split()
    assert (
        abs(float(number) * {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit] - nbytes)
        <= nbytes / 19
    )
    assert float(number) < 1000
    assert len(number.replace(".", "")) in ((1, 2, 3) if unit == "bytes" else (2, 3))


OTHER_DIGITS = ["٣", "१०", "５０", "1_0", "", " ", "+", "-", "--1", "1 0", "x", "0x10", "1,5", "²", "Ⅷ"]


@pytest.mark.spec("UNIT-3")
@pytest.mark.parametrize("text", ["٣MB", "５０MB", "1٫5GB", "1_000", "१KB", "3ＭB"])
def test_a_size_in_other_digits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        parse_nbytes(text)


@pytest.mark.spec("UNIT-3")
@given(st.integers(), st.sampled_from(["{}", " {}", "{}\n"]))
def test_a_whole_number_is_read_back(n: int, form: str) -> None:
    assert parse_integer(form.format(n)) == n
    assert parse_integer(f"+{abs(n)}") == abs(n)


@pytest.mark.spec("UNIT-3")
@pytest.mark.parametrize("text", [*OTHER_DIGITS, "1.0", "1e3", "nan", "9" * 5000])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        parse_integer(text)


@pytest.mark.spec("UNIT-3")
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_back(x: float) -> None:
    assert parse_number(repr(x)) == x
    assert parse_number(f"{x:e}") == float(f"{x:e}")


@pytest.mark.spec("UNIT-3")
@pytest.mark.parametrize("text", [".5", "5.", "-.5e-3", "+1E5", "007"])
def test_every_usual_way_to_write_a_number_is_read(text: str) -> None:
    assert parse_number(text) == float(text)


@pytest.mark.spec("UNIT-3")
@pytest.mark.parametrize("text", [*OTHER_DIGITS, "nan", "-NaN", "inf", "Infinity", ".", "1e", "e5", "1.2.3", "٠.٥"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(text)


@pytest.mark.spec("INPUT-3")
@given(st.text() | st.lists(st.integers()) | st.binary(), st.integers(10, 100))
def test_a_value_is_shown_whole_if_it_is_short_and_else_with_its_ends(value: object, most: int) -> None:
    text, whole = shown(value, most), repr(value)
    if len(whole) <= most:
        assert text == whole
    else:
        start, _, end = text.partition("...")
        assert len(text) <= most
        assert whole.startswith(start)
        assert whole.endswith(end)


@pytest.mark.spec("INPUT-3")
def test_values_that_python_cannot_write_down_are_shown_too() -> None:
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested]
    assert shown(10**5000) == "a value of type int that is too long to show"
    assert shown(nested) == "a value of type list that is too long to show"
    assert len(shown("x" * 70_000)) <= 80
    assert shortened("abc", 3) == "abc"
