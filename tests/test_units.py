import pytest

from asyncrl.units import format_bytes


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (1_500_000_000, "1.5 GB"),
        (2e15, "2000.0 TB"),
    ],
)
def test_bytes_in_decimal_units(n, text):
    assert format_bytes(n) == text
