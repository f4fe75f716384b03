import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bitnet.errors import ConfigError
from moe_bitnet.units import format_bytes, parse_memory


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("24GB", 24 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (" 7 kb ", 7000),
        ("0.1GB", 10**8),
        ("2TiB", 2**41),
        ("123", 123),
        ("33B", 33),
        (123, 123),
        (0, 0),
    ],
)
def test_memory_sizes_are_read_with_their_units(size: int | str, num_bytes: int) -> None:
    assert parse_memory(size) == num_bytes


@pytest.mark.parametrize(
    "size", ["", "GB", "-1GB", "1e9", "24 G", "1,5GB", "24GBit", "٣GB", -1, 1.5, True, None, "9" * 5000]
)
def test_what_is_no_memory_size_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match="memory size"):
        parse_memory(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_200_000, "1.2 MB"),
        (88_080_384, "88.08 MB"),
        (20 * 10**9, "20 GB"),
        (999_999, "1 MB"),
        (13 * 10**11, "1.3 TB"),
        (1234 * 10**12, "1234 TB"),
    ],
)
def test_sizes_are_written_in_decimal_units(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10**17))
def test_a_written_size_reads_back_to_four_digits(num_bytes: int) -> None:
    assert parse_memory(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=5.1e-4)
