"""Memory sizes as people write and read them.

Decimal and binary units differ: ``GB`` is 1e9 bytes and ``GiB`` is 2**30. Both can be
written; what is printed is always decimal.
"""

import re
from fractions import Fraction

from moe_bitnet.errors import ConfigError

_UNIT_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MEMORY_PATTERN = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)\s*")


def parse_memory(size: int | str) -> int:
    """Read a memory size in bytes.

    Letter case and spaces do not matter; a fraction of a byte is dropped.

    Args:
        size: bytes as an integer, or text such as ``"24GB"``, ``"512 MiB"``, ``"1.5GiB"`` or ``"123"``.
    Returns:
        Bytes, at least 0.
    Raises:
        ConfigError: a negative integer, or text that is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _MEMORY_PATTERN.fullmatch(size) if isinstance(size, str) else None
    if match is None or (match[2] or "b").lower() not in _UNIT_BYTES:
        raise ConfigError(
            f"memory size is {size!r}; give bytes as an integer, or text such as 24GB (1e9 bytes each) "
            f"or 24GiB (2**30 bytes each). Units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB."
        )
    return int(Fraction(match[1]) * _UNIT_BYTES[(match[2] or "b").lower()])


def format_bytes(num_bytes: float) -> str:
    """Write a size for people: decimal units (``MB`` is 1e6 bytes), four significant digits."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.95:  # 999.95 would print as 1000
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB" if abs(value) < 999.95 else f"{value:.0f} TB"
