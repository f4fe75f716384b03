import math

import pytest

from moe_bitnet.cli.reporting.units import (
    DASH,
    divide,
    format_bytes,
    format_change,
    format_count,
    format_number,
    format_ratio,
    format_seconds,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_dash(value: float) -> None:
    assert {format_bytes(value), format_ratio(value), format_change(value), format_number(value)} == {DASH}
    assert format_seconds(value) == DASH
    assert divide(value, 2.0) is None


def test_a_ratio_to_zero_or_nothing_is_none() -> None:
    assert divide(3, 0) is None
    assert divide(3, None) is None
    assert divide(0, 3) == 0.0


def test_changes_and_ratios_read_naturally() -> None:
    assert (format_change(1.02), format_change(0.98)) == ("+2.0 %", "−2.0 %")
    assert (format_ratio(0), format_ratio(0.348), format_ratio(3.594)) == ("0×", "0.348×", "3.59×")


def test_counts_and_durations_stay_short() -> None:
    assert (format_count(8_421_376), format_count(123_456_789)) == ("8,421,376", "123.5 M")
    assert (format_seconds(59.94), format_seconds(59.96), format_seconds(3720)) == (
        "59.9 s",
        "1 min 00 s",
        "1 h 02 min",
    )
